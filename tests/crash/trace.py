"""What a process does to the files below a directory, as strace sees it.

strace sees every call, SQLite's included, in the order in which the kernel took them.  Only
what this project and SQLite use is understood; anything else that touches a file below the
directory is an error, so that nothing is overlooked.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

_FILE_CALLS = (
    "openat,open,creat,close,write,pwrite64,pwritev,pwritev2,writev,ftruncate,truncate,fallocate,"
    "fsync,fdatasync,io_submit,io_getevents,syncfs,sync,sync_file_range,msync,mmap,munmap,rename,renameat,renameat2,"
    "unlink,unlinkat,rmdir,mkdir,mkdirat,link,linkat,symlink,symlinkat,dup,dup2,dup3,fcntl,"
    "copy_file_range,sendfile,splice,setxattr,lsetxattr,fsetxattr,removexattr,fremovexattr"
)
_LINE = re.compile(r"(\d+) +(.*)")
_CALL = re.compile(r"(\w+)\((.*)\) += (-?\w+)(?: .*)?")
_UNFINISHED = re.compile(r"(.*) <unfinished \.\.\.>")
_RESUMED = re.compile(r"<\.\.\. (\w+) resumed>(.*)")
_SUBMITTED = re.compile(r"aio_data=(\w+), aio_lio_opcode=IOCB_CMD_(FDSYNC|FSYNC), aio_fildes=(\d+)")
_ENDED = re.compile(r"data=(\w+), obj=\w+, res=(-?\w+)")
_NO_EFFECT = {"fcntl", "dup", "dup2", "dup3"}


class Call(NamedTuple):
    """A system call, or the first half of one."""

    thread: int
    name: str
    arguments: list[str]
    result: int | None
    """None when it has only begun."""
    resumed: bool = False
    """Its first half was told before."""


class Event(NamedTuple):
    """Something that happened to the files, or (``mark``) a line that the process printed."""

    kind: str
    path: str = ""
    other: str = ""
    offset: int = 0
    size: int = 0
    data: bytes = b""
    thread: int = 0
    sync: bool = False
    """The descriptor of a write waits for the medium."""


def record(
    command: list[str], log: Path, environment: Mapping[str, str], timeout: float, status: int = 0
) -> None:
    """Run *command*, which shall end with *status*, under strace."""
    done = subprocess.run(
        ["strace", "-f", "-qq", "-xx", "-s", "4194304", "--seccomp-bpf",
         "-e", f"trace={_FILE_CALLS}", "-e", "signal=none", "-o", str(log), *command],
        env=dict(environment), capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (status, ""), f"{done.returncode}: {done.stderr}"


def calls(log: Path) -> Iterator[Call]:
    """The calls of a log; one that others overtook comes twice, begun and done."""
    begun: dict[int, str] = {}
    with log.open() as lines:
        for line in lines:
            found = _LINE.fullmatch(line.rstrip("\n"))
            assert found, line[:200]
            thread, text = int(found[1]), found[2]
            if text.startswith(("+++", "---")):
                continue
            if unfinished := _UNFINISHED.fullmatch(text):
                begun[thread] = unfinished[1]
                name, _, arguments = unfinished[1].partition("(")
                yield Call(thread, name, _split(arguments), None)
                continue
            resumed = _RESUMED.fullmatch(text)
            if resumed:
                text = begun.pop(thread) + resumed[2]
            call = _CALL.fullmatch(text)
            assert call, text[:200]
            result = -1 if call[3] == "?" else int(call[3], 0)
            yield Call(thread, call[1], _split(call[2]), result, resumed is not None)


def _split(text: str) -> list[str]:
    """Arguments; strings are all hex escapes and so hold no comma."""
    return [part.strip() for part in text.split(", ")] if text else []


def _bytes(text: str) -> bytes:
    assert text.startswith('"'), f"a string was cut: {text[:80]}"
    assert text.endswith('"'), f"a string was cut: {text[-80:]}"
    return bytes.fromhex(text[1:-1].replace("\\x", ""))


class _Open(NamedTuple):
    path: str
    sync: bool


class Reader:
    """Turns calls into events on files below *root*."""

    def __init__(self, root: Path) -> None:
        self._root = f"{root}/"
        self._open: dict[int, _Open] = {}
        self._maps: dict[int, tuple[int, str, int]] = {}  # size, path, offset in the file
        self._waiting: dict[int, str] = {}  # threads in a sync that has begun

    def events(self, log: Path) -> Iterator[Event]:
        for call in calls(log):
            if call.result is not None and call.result < 0 and call.result > -4096:
                assert call.name not in ("fsync", "fdatasync", "msync", "pwrite64"), call
                continue  # failed: no effect
            method = getattr(self, f"_{call.name}", None)
            if method is not None:
                yield from method(call)
            elif call.name not in _NO_EFFECT:
                touched = [a for a in call.arguments if a.isdigit() and int(a) in self._open]
                assert not touched, f"not understood: {call}"

    def _path(self, directory: str, name: str) -> str:
        path = os.fsdecode(_bytes(name))
        if not path.startswith("/") and directory.isdigit() and int(directory) in self._open:
            path = f"{self._open[int(directory)].path}/{path}"
        return os.path.normpath(path)

    def _inside(self, path: str) -> bool:
        return f"{path}/".startswith(self._root)

    def _openat(self, call: Call) -> Iterator[Event]:
        if call.result is None:
            return
        path = self._path(*call.arguments[:2])
        self._open.pop(call.result, None)
        if not self._inside(path):
            return
        flags = call.arguments[2].split("|")
        self._open[call.result] = _Open(path, bool({"O_SYNC", "O_DSYNC"} & set(flags)))
        if "O_CREAT" in flags:
            yield Event("create", path)
        if "O_TRUNC" in flags:
            yield Event("truncate", path, size=0)

    def _close(self, call: Call) -> Iterator[Event]:
        # It does not exist for others once it was begun; at its end the number may be another's.
        if call.arguments[0].isdigit() and not call.resumed:
            self._open.pop(int(call.arguments[0]), None)
        yield from ()

    def _write(self, call: Call) -> Iterator[Event]:
        if call.result is not None and call.arguments[0] == "1":
            yield Event("mark", data=_bytes(call.arguments[1]))
        assert not (call.arguments[0].isdigit() and int(call.arguments[0]) in self._open), call

    def _pwrite64(self, call: Call) -> Iterator[Event]:
        if call.result is None or int(call.arguments[0]) not in self._open:
            return
        file = self._open[int(call.arguments[0])]
        data = _bytes(call.arguments[1])[: call.result]
        yield Event("write", file.path, offset=int(call.arguments[3]), data=data, sync=file.sync)

    def _ftruncate(self, call: Call) -> Iterator[Event]:
        if call.result is not None and (file := self._open.get(int(call.arguments[0]))):
            yield Event("truncate", file.path, size=int(call.arguments[1]))

    def _fallocate(self, call: Call) -> Iterator[Event]:
        if call.result is not None and (file := self._open.get(int(call.arguments[0]))):
            offset, size = (int(argument) for argument in call.arguments[2:4])
            if re.search("PUNCH_HOLE|ZERO_RANGE", call.arguments[1]):
                yield Event("write", file.path, offset=offset, data=bytes(size), sync=False)
                return
            if call.arguments[1] == "FALLOC_FL_KEEP_SIZE":
                return
            assert call.arguments[1] == "0", call
            yield Event("extend", file.path, size=offset + size)

    def _fsetxattr(self, call: Call) -> Iterator[Event]:
        if call.result is not None and (file := self._open.get(int(call.arguments[0]))):
            name, value = (_bytes(argument) for argument in call.arguments[1:3])
            yield Event("attribute", file.path, os.fsdecode(name), data=value)

    def _synced(self, call: Call, begin: Event, end: str) -> Iterator[Event]:
        """A sync covers what was done before it began, and covers it when it has returned."""
        if self._waiting.pop(call.thread, "") == "":
            yield begin
            if call.result is None:
                self._waiting[call.thread] = begin.path
        if call.result is not None:
            yield Event(end, thread=call.thread)

    def _fsync(self, call: Call) -> Iterator[Event]:
        waiting = self._waiting.get(call.thread)
        file = self._open.get(int(call.arguments[0]))
        path = waiting or (file.path if file else "")
        if path:
            what = "data" if call.name == "fdatasync" else ""
            yield from self._synced(call, Event("sync", path, what, thread=call.thread), "synced")

    _fdatasync = _fsync

    def _io_submit(self, call: Call) -> Iterator[Event]:
        found = _SUBMITTED.search(", ".join(call.arguments))
        if call.result is not None and found and (file := self._open.get(int(found[3]))):
            what = "data" if found[2] == "FDSYNC" else ""
            number = -int(found[1], 16)  # where a thread's number is otherwise
            self._waiting[number] = file.path
            yield Event("sync", file.path, what, thread=number)

    def _io_getevents(self, call: Call) -> Iterator[Event]:
        for number, result in _ENDED.findall(", ".join(call.arguments)):
            assert result == "0", call
            if call.result is not None and self._waiting.pop(-int(number, 16), ""):
                yield Event("synced", thread=-int(number, 16))

    def _syncfs(self, call: Call) -> Iterator[Event]:
        yield from self._synced(
            call, Event("sync", self._root.rstrip("/"), "all", thread=call.thread), "synced"
        )

    def _mmap(self, call: Call) -> Iterator[Event]:
        if call.result is not None and call.arguments[4].isdigit():
            file = self._open.get(int(call.arguments[4]))
            if file:
                assert "MAP_PRIVATE" in call.arguments[3] or "PROT_WRITE" not in call.arguments[2]
                where = int(call.arguments[1]), file.path, int(call.arguments[5], 0)
                self._maps[call.result] = where
            else:
                self._maps.pop(call.result, None)
        yield from ()

    def _munmap(self, call: Call) -> Iterator[Event]:
        if not call.resumed:
            self._maps.pop(int(call.arguments[0], 0), None)
        yield from ()

    def _msync(self, call: Call) -> Iterator[Event]:
        address, length = int(call.arguments[0], 0), int(call.arguments[1])
        for start, (size, path, offset) in self._maps.items():
            if start <= address < start + size:
                begin = Event("sync", path, "range", address - start + offset, length,
                              thread=call.thread)  # fmt: skip
                yield from self._synced(call, begin, "synced")
                return

    def _rename(self, call: Call) -> Iterator[Event]:
        if call.result is not None:
            old, new = (self._path("", name) for name in call.arguments[:2])
            if self._inside(old) or self._inside(new):
                for fd, file in self._open.items():
                    if file.path == old:
                        self._open[fd] = file._replace(path=new)
                yield Event("rename", old, new)

    def _unlink(self, call: Call) -> Iterator[Event]:
        if call.result is not None and self._inside(path := self._path("", call.arguments[0])):
            yield Event("unlink", path)

    def _unlinkat(self, call: Call) -> Iterator[Event]:
        if call.result is not None and self._inside(path := self._path(*call.arguments[:2])):
            yield Event("unlink", path)

    def _rmdir(self, call: Call) -> Iterator[Event]:
        yield from self._unlink(call)

    def _mkdir(self, call: Call) -> Iterator[Event]:
        if call.result is not None and self._inside(path := self._path("", call.arguments[0])):
            yield Event("mkdir", path)

    def _mkdirat(self, call: Call) -> Iterator[Event]:
        if call.result is not None and self._inside(path := self._path(*call.arguments[:2])):
            yield Event("mkdir", path)
