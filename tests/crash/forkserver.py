"""Processes that serve, made by forking one that has imported everything: a start costs 10 ms.

``python -m tests.crash.forkserver`` reads a JSON list from each line of its input, forks, and
prints the child's process ID; the child's output goes to the same place.  The next line is read
when the child has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

from tests.support.helpers import PATIENCE, environment


def serve(kind: str, *arguments: str) -> None:
    """``provider CONFIG``, or ``mount SOURCE MOUNTPOINT OPTIONS``."""
    if kind == "mount":
        from warabifs.mount.main import main

        source, mountpoint, options = arguments
        main([source, mountpoint, "-f", "-o", options])
        return
    from warabi.engine import Engine
    from warabi.server import Provider

    with Engine("na+sm") as engine, Provider(engine, 1, arguments[0]):
        os.write(1, f"{engine.addr()}\n".encode())
        engine.wait_for_finalize()


def main() -> None:
    import warabi.engine
    import warabi.server  # noqa: F401
    import warabifs.mount.main  # noqa: F401

    for line in iter(sys.stdin.readline, ""):
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            try:
                serve(*json.loads(line))
            finally:
                os._exit(1)
        os.write(1, f"{pid}\n".encode())
        os.waitpid(pid, 0)


class Server:
    """Starts one child after the other."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._child = -1  # its descriptor: the number of a dead child may be another's
        self._mountpoint = ""

    def start(self, *arguments: str) -> None:
        """Fork a child that serves *arguments*."""
        self.close()
        self._mountpoint = arguments[2] if arguments[0] == "mount" else ""
        pipe = self._process.stdin
        assert pipe is not None
        pipe.write(f"{json.dumps(arguments)}\n".encode())
        while not (line := self.line()).isdigit():
            pass  # the last words of a child that was killed
        self._child = os.pidfd_open(int(line))

    def line(self) -> str:
        """The next line of output."""
        assert self._process.stdout is not None
        text = b""
        while not text.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
            assert ready, "nothing is heard of a process that serves"
            byte = os.read(self._process.stdout.fileno(), 1)
            assert byte, "the process that forks has ended"
            text += byte
        return text.decode().strip()

    def kill(self) -> None:
        """SIGKILL to the child, if it lives; returns when it does not."""
        if self._child >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._child, signal.SIGKILL)
            if self._mountpoint:
                # A thread that was just telling the kernel of a name waits in there for a user of
                # the mount, who waits for the mount: only this ends them.
                command = ["umount", "-i", "-f", self._mountpoint]
                subprocess.run(command, capture_output=True, timeout=60)
            ended, _, _ = select.select([self._child], [], [], PATIENCE)
            assert ended, "a killed process does not end"

    def close(self) -> None:
        """Kill, and forget."""
        self.kill()
        if self._child >= 0:
            os.close(self._child)
            self._child = -1


@contextlib.contextmanager
def server() -> Iterator[Server]:
    """A :class:`Server` while the block runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.crash.forkserver"],
        env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
    )  # fmt: skip
    started = Server(process)
    try:
        yield started
    finally:
        started.close()
        process.kill()
        process.communicate()


if __name__ == "__main__":
    main()
