"""Counts of system calls and of FUSE requests, from strace's account of processes at work.

Counts do not depend on how fast or how busy the machine is.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.processes import PATIENCE, Failed

_OPCODES = {
    1: "LOOKUP", 2: "FORGET", 3: "GETATTR", 4: "SETATTR", 5: "READLINK", 6: "SYMLINK", 8: "MKNOD",
    9: "MKDIR", 10: "UNLINK", 11: "RMDIR", 12: "RENAME", 13: "LINK", 14: "OPEN", 15: "READ",
    16: "WRITE", 17: "STATFS", 18: "RELEASE", 20: "FSYNC", 21: "SETXATTR", 22: "GETXATTR",
    23: "LISTXATTR", 24: "REMOVEXATTR", 25: "FLUSH", 26: "INIT", 27: "OPENDIR", 28: "READDIR",
    29: "RELEASEDIR", 30: "FSYNCDIR", 34: "ACCESS", 35: "CREATE", 36: "INTERRUPT", 39: "IOCTL",
    42: "BATCH_FORGET", 43: "FALLOCATE", 44: "READDIRPLUS", 45: "RENAME2", 46: "LSEEK",
    47: "COPY_FILE_RANGE", 50: "SYNCFS", 51: "TMPFILE", 52: "STATX",
}  # fmt: skip
_CALL = re.compile(r"^(\d+) +(\w+)\((.*)$")
_RESUMED = re.compile(r"^(\d+) +<\.\.\. (\w+) resumed>(.*)$")
_DESCRIPTOR = re.compile(r"^\d+<((?:\\x[0-9a-f]{2})+)>")
_HEAD = re.compile(r'"((?:\\x[0-9a-f]{2}){8})')
MARK = "/warabi-benchmarks"
"""Where a file is asked for that is not there: a traced process says so where it is."""


def mark(name: str) -> str:
    """A path that, asked for, begins the section *name* of an account."""
    return f"{MARK}/{name}"


def _text(escaped: str) -> str:
    return bytes.fromhex(escaped.replace("\\x", "")).decode(errors="replace")


class Account:
    """What strace wrote, counted.

    Attributes:
        calls: by section, process and system call.
        requests: FUSE requests by their kind, of every section.
        sections: their names, those without system calls too.
    """

    def __init__(self, lines: Iterator[str] | Sequence[str]) -> None:
        self.calls: Counter[tuple[str, int, str]] = Counter()
        self.requests: Counter[str] = Counter()
        self.sections: list[str] = []
        self._section = ""
        self._reading: set[str] = set()  # threads in the middle of a read of /dev/fuse
        for line in lines:
            if called := _CALL.match(line):
                self._called(*called.groups())
            elif resumed := _RESUMED.match(line):
                thread, _, rest = resumed.groups()
                if thread in self._reading:
                    self._reading.discard(thread)
                    self._request(rest)

    def _called(self, thread: str, name: str, rest: str) -> None:
        if marked := re.search(r'"((?:\\x[0-9a-f]{2})+)"', rest) if "access" in name else None:
            path = _text(marked[1])
            if path.startswith(MARK):
                self._section = path.removeprefix(MARK).strip("/")
                self.sections += filter(None, [self._section])
                return
        if name == "sched_yield" or (name.startswith(("recv", "readv")) and "EAGAIN" in rest):
            return  # a look for what has not come yet: how many is a matter of moments
        self.calls[self._section, int(thread), name] += 1
        of = _DESCRIPTOR.match(rest)
        if name in ("read", "readv") and of and _text(of[1]) == "/dev/fuse":
            if "<unfinished" in rest:
                self._reading.add(thread)
            else:
                self._request(rest)

    def _request(self, rest: str) -> None:
        if head := _HEAD.search(rest):  # else there was nothing to read
            opcode = int.from_bytes(bytes.fromhex(head[1].replace("\\x", ""))[4:8], "little")
            self.requests[_OPCODES.get(opcode, f"opcode {opcode}")] += 1


@contextlib.contextmanager
def traced(log: Path, *pids: int) -> Iterator[None]:
    """Account of these processes and all their threads, in *log*, during the block.

    Raises:
        Failed: strace may not look at them.
    """
    words = [word for pid in pids for word in ("-p", str(pid))]
    # 200 bytes of a string: a mark's path; the heads of requests need 8.
    command = ["strace", "-f", "-y", "-xx", "-s", "200", "-o", str(log), *words]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        with process:
            deadline = time.monotonic() + PATIENCE
            while not all(_is_traced(pid) for pid in pids):
                if process.poll() is not None or time.monotonic() > deadline:
                    assert process.stderr is not None
                    raise Failed(f"strace: {process.stderr.readline().strip()}")
                time.sleep(0.01)
            yield
            process.terminate()  # it lets go of them first
            process.communicate(timeout=PATIENCE)
    finally:
        process.kill()


def _is_traced(pid: int) -> bool:
    """Whether every thread of the process has a tracer."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            if "TracerPid:\t0\n" in (task / "status").read_text():
                return False
        return True
    return False


def account(log: Path) -> Account:
    with log.open(errors="replace") as file:
        return Account(file)
