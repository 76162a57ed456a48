"""Mounts as the tests see them: a path, and a process of its own that serves it.

A test never serves what it touches: the kernel would wait for the very loop that waits for the
kernel.  Everything here has a limit in time, and everything that starts also ends: what
``Mount.close`` leaves running is killed, and is an error.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ("memory", "file")
PASSED = ("memory-passed", "file-passed")
"""Embedded targets whose regions the kernel reads and writes by itself."""
PYFUSE3 = ("file-pyfuse3", "engine-pyfuse3")
"""Targets that are mounted by the other front end."""
SOURCES = (*BACKENDS, "engine", "tcp")
FRONT_END: list[str] = []
"""The option that every mount gets; the fixture ``front_end`` sets it."""
PROVIDER_ID = 7
PATIENCE = 60.0  # seconds after which anything at all counts as hung
MIB = 1024 * 1024

_SUSPICIOUS = re.compile(r"Traceback|unhandled exception in|Segmentation|core dumped")


def environment() -> dict[str, str]:
    """For processes that import this checkout, whether or not it is installed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "LC_ALL": "C.UTF-8"}


def run(
    *command: str | Path, check: bool = True, timeout: float = PATIENCE, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end; its output is in the message when it fails."""
    done = subprocess.run(
        [str(word) for word in command], text=True, errors="surrogateescape", timeout=timeout,
        capture_output=True, stdin=subprocess.DEVNULL, env=environment(), check=False, **options,
    )  # fmt: skip
    if check and done.returncode:
        shown = " ".join(map(str, command))
        raise AssertionError(f"{shown}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def python(script: str, *arguments: str | Path, check: bool = True) -> str:
    """What *script* prints, run by another Python process; *arguments* are its ``sys.argv[1:]``."""
    return run(sys.executable, "-W", "error", "-c", script, *arguments, check=check).stdout


@contextlib.contextmanager
def another_python(
    script: str, *arguments: str | Path, prefix: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen[str]]:
    """A Python process that talks over its standard input and output while the block runs."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    try:
        with process:
            yield process
            process.kill()
    finally:
        process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    """The next line that *process* prints."""
    assert process.stdout is not None
    fd, line = process.stdout.fileno(), b""
    while not line.endswith(b"\n"):
        # Byte by byte: what the file object reads ahead, select(2) does not see.
        ready, _, _ = select.select([fd], [], [], PATIENCE)
        assert ready, "the process does not answer"
        byte = os.read(fd, 1)
        assert byte, f"the process has ended, its last word: {line!r}"
        line += byte
    return line.decode().rstrip("\n")


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Return once *condition* holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


@contextlib.contextmanager
def fails_with(*numbers: int) -> Iterator[None]:
    """The block must end with an ``OSError`` of one of these numbers."""
    wanted = " or ".join(errno.errorcode[number] for number in numbers)
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise AssertionError(f"expected {wanted}, got {error!r}") from error
    else:
        raise AssertionError(f"expected {wanted}, but nothing failed")


def is_mounted(path: Path) -> bool:
    """Whether something is mounted on *path*, without asking it."""
    shown = str(path).replace(" ", "\\040")
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == shown for line in lines)


def processes_of(path: Path) -> list[int]:
    """The processes with a word of their command line at or below *path*."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if any(os.fsencode(path) in word for word in words):
                    found.append(int(entry.name))
    return found


class Mount:
    """A mount of *source* on *path*, and the process that serves it.

    Attributes:
        pid: of the process; of the last one after it ended.
        expected: text that makes a suspicious line of the log a wanted one.
    """

    def __init__(self, source: str, path: Path, log: Path, *options: str) -> None:
        self.source = source
        self.path = path
        self.log = log
        self.options = options
        self.pid = 0
        self.expected: tuple[str, ...] = ()
        self._process: subprocess.Popen[str] | None = None
        self._pidfd = -1
        self._read = 0

    def command(self, *more: str) -> list[str]:
        options = ",".join((f"log={self.log}", *FRONT_END, *self.options))
        module = [sys.executable, "-m", "warabifs.mount.main", self.source, str(self.path)]
        return [*module, "-o", options, *more]

    def start(self) -> None:
        """Mount in the background; it can be used when this returns."""
        run(*self.command())
        self.adopt()

    def adopt(self) -> None:
        """Find the process of a mount that somebody started by :meth:`command`."""
        self._watch(self._find())

    def start_in_foreground(self) -> None:
        """Mount with ``-f``; returns when the mount is there."""
        self._process = subprocess.Popen(
            self.command("-f"), stdin=subprocess.DEVNULL, env=environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._watch(self._process.pid)
        wait_until(lambda: is_mounted(self.path) or self._gone(0), f"a mount on {self.path}")

    def _find(self) -> int:
        """The newest process of the mount: the one before it may still be closing.

        A program that it is about to start has its command line until execve(2), and is none.
        """
        found = [pid for pid in processes_of(self.path) if b"warabifs" in _cmdline(pid)]
        found = [pid for pid in found if _stat(pid, 4) not in found]
        assert found, f"no process serves {self.path}"
        return max(found, key=lambda pid: _stat(pid, 22))

    def _watch(self, pid: int) -> None:
        self._forget_process()
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)

    def _forget_process(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _gone(self, timeout: float) -> bool:
        if self._pidfd < 0:
            return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def wait(self) -> int:
        """Wait for the process to end; its exit status, 0 for one in the background."""
        assert self._gone(PATIENCE), f"process {self.pid} of {self.path} does not end"
        if self._process is None:
            return 0
        status = self._process.wait(PATIENCE)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process = None
        return status

    @property
    def lock(self) -> Path:
        """What the owner of a ``file:`` target holds locked."""
        return Path(f"{self.source.removeprefix('file:')}.regions/LOCK")

    @property
    def alive(self) -> bool:
        return not self._gone(0)

    def signal(self, number: int) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def unmount(self) -> int:
        """``fusermount3 -u``, and wait for the process; its exit status."""
        run("fusermount3", "-u", self.path)
        return self.wait()

    def kill(self) -> None:
        """End the process with SIGKILL; a dead mount stays."""
        self.signal(signal.SIGKILL)
        self.wait()

    def remount(self) -> None:
        """Unmount and mount again."""
        self.unmount()
        self.start()

    def new_log(self) -> str:
        """What was logged since the last call."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        start, self._read = self._read, len(text)
        return text[start:]

    def check_log(self) -> None:
        """Fail when the log shows a defect since the last call."""
        text = self.new_log()
        if not any(wanted in text for wanted in self.expected):
            assert not _SUSPICIOUS.search(text), f"log of the mount:\n{text}"

    def close(self) -> None:
        """Unmount whatever is there; raises when the process had to be killed."""
        try:
            if is_mounted(self.path):
                run("fusermount3", "-u", "-z", self.path, check=False)
            if not self._gone(PATIENCE):
                self.signal(signal.SIGKILL)
                raise AssertionError(f"process {self.pid} outlived its mount:\n{self.new_log()}")
        finally:
            self.wait()
            self._forget_process()


def _stat(pid: int, field: int) -> int:
    """A field of /proc/PID/stat, as proc_pid_stat(5) numbers them: 4 is the parent, 22 the time of
    the start in clock ticks; 0 if the process has ended."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[field - 3])
    return 0


def _cmdline(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


# Who reads the address may end the process, so that comes when a signal does it in order.
_SERVE = """
import signal, sys, threading, time
from warabi.engine import Engine
from warabi.server import Provider
transport, provider_id, config, settings = sys.argv[1:]
before = signal.getsignal(signal.SIGINT)
def announce():
    while signal.getsignal(signal.SIGINT) is before:
        time.sleep(0.001)
    print(engine.addr(), flush=True)
with Engine(transport, config=settings) as engine, Provider(engine, int(provider_id), config):
    threading.Thread(target=announce, daemon=True).start()
    engine.wait_for_finalize()
"""


class Provider:
    """A provider in a process of its own.

    Args:
        transport: ``na+sm`` or ``tcp``.
        config: of the provider.
        engine: of its engine.
        before: Python that its process runs first.
    """

    def __init__(
        self,
        transport: str,
        config: dict[str, Any],
        engine: dict[str, Any] | None = None,
        before: str = "",
    ) -> None:
        arguments = [transport, str(PROVIDER_ID), json.dumps(config), json.dumps(engine or {})]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", before + _SERVE, *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip
        try:
            self.address = line_of(self.process)
            assert "://" in self.address, "the provider did not start"
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        with self.process:  # closes the pipe
            self.process.terminate()
            try:
                self.process.wait(PATIENCE)
            finally:
                self.process.kill()

    def kill(self) -> None:
        """End the process with SIGKILL, and remove the socket that it could not remove."""
        self.process.kill()
        self.process.wait()
        directory = os.environ.get("WARABI_RUNTIME_DIR", "")
        if directory:
            name = self.address.rpartition("/")[2]
            Path(directory, f"{name}.sock").unlink(missing_ok=True)


@contextlib.contextmanager
def serving(
    transport: str,
    target: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    before: str = "",
) -> Iterator[Provider]:
    """A provider process, with a target in memory unless told, while the block runs."""
    provider = Provider(transport, {"target": target or {"type": "memory"}}, engine, before)
    try:
        yield provider
    finally:
        provider.close()


@contextlib.contextmanager
def source_of(kind: str, place: Path) -> Iterator[tuple[str, list[str]]]:
    """The source, and its options, of one of ``SOURCES`` or ``PASSED``, with files in *place*."""
    kind, _, how = kind.partition("-")
    options = {"": [], "passed": ["passthrough"], "pyfuse3": ["frontend=pyfuse3"]}[how]
    if kind == "memory":
        yield "memory:", options
    elif kind == "file":
        yield f"file:{place}/target", options
    else:
        with serving({"engine": "na+sm", "tcp": "tcp"}[kind]) as provider:
            yield provider.address, [f"provider_id={PROVIDER_ID}", *options]


@contextlib.contextmanager
def mounting(source: str, place: Path, *options: str, start: bool = True) -> Iterator[Mount]:
    """A mount of *source* on ``place/mnt`` while the block runs."""
    path = place / "mnt"
    path.mkdir(exist_ok=True)
    mount = Mount(source, path, place / "mount.log", *options)
    try:
        if start:
            mount.start()
        yield mount
    finally:
        mount.close()
    mount.check_log()


@contextlib.contextmanager
def watchdog(mount: Mount, seconds: float) -> Iterator[None]:
    """Kill the mount's process when the block takes longer: whoever waits for it gets an error.

    A thread that waits for a file system cannot be interrupted, not even by pytest-timeout.
    """
    timer = threading.Timer(seconds, mount.signal, [signal.SIGKILL])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
