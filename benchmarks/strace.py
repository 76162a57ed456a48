"""Counts system calls and FUSE requests of running processes with strace.

Counts must depend on the code alone, not on the speed or load of the machine.  So polls that find
nothing are not counted: their number depends on timing.
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
_UNFINISHED = "<unfinished ...>"
_DESCRIPTOR = re.compile(r"^\d+<((?:\\x[0-9a-f]{2})+)>")
_HEAD = re.compile(r'"((?:\\x[0-9a-f]{2}){8})')
_NOTHING_THERE = {
    "epoll_wait": re.compile(r", 0\) += 0\b"),
    "poll": re.compile(r", 0\) += 0\b"),
    **dict.fromkeys(("recvfrom", "recvmsg", "readv"), re.compile(r"= -1 EAGAIN\b")),
}
"""How calls that look for something end where it has not come yet; those with a time to wait for
it are no looks."""
_IDLE = ("sched_yield", "clock_nanosleep")
EVENTFD = "eventfd"
"""What reads and writes of an eventfd(2) are counted as."""
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
        calls: by section, thread and system call, which is counted where it began.
        requests: FUSE requests by their kind, of every section.
        sections: their names, those without system calls too.
    """

    def __init__(self, lines: Iterator[str] | Sequence[str]) -> None:
        self.calls: Counter[tuple[str, int, str]] = Counter()
        self.requests: Counter[str] = Counter()
        self.sections: list[str] = []
        section = ""
        begun: dict[str, tuple[str, str, str]] = {}  # by thread: section, name and arguments
        for line in lines:
            if called := _CALL.match(line):
                thread, name, rest = called.groups()
                if (marked := _marked(name, rest)) is not None:
                    section = marked
                    self.sections += filter(None, [section])
                elif rest.endswith(_UNFINISHED):
                    begun[thread] = section, name, rest.removesuffix(_UNFINISHED)
                else:
                    self._called(section, thread, name, rest)
            elif (resumed := _RESUMED.match(line)) and resumed[1] in begun:
                of, name, rest = begun.pop(resumed[1])
                self._called(of, resumed[1], name, rest + resumed[3])
        for thread, (of, name, rest) in begun.items():
            self._called(of, thread, name, rest)

    def _called(self, section: str, thread: str, name: str, rest: str) -> None:
        if name in _IDLE or ((nothing := _NOTHING_THERE.get(name)) and nothing.search(rest)):
            return
        of = _DESCRIPTOR.match(rest)
        file = _text(of[1]) if of else ""
        if name in ("read", "write") and file == "anon_inode:[eventfd]":
            name = EVENTFD
        self.calls[section, int(thread), name] += 1
        if name in ("read", "readv") and file == "/dev/fuse" and (head := _HEAD.search(rest)):
            opcode = int.from_bytes(bytes.fromhex(head[1].replace("\\x", ""))[4:8], "little")
            self.requests[_OPCODES.get(opcode, f"opcode {opcode}")] += 1


def _marked(name: str, rest: str) -> str | None:
    """The section that a call begins, if it is a mark."""
    path = re.search(r'"((?:\\x[0-9a-f]{2})+)"', rest) if "access" in name else None
    text = _text(path[1]) if path else ""
    return text.removeprefix(MARK).strip("/") if text.startswith(MARK) else None


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
