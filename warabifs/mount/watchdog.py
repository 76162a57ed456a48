"""Frees those who wait for a mount whose process was killed and cannot end.

A mount tells the kernel, from a thread, to forget names.  The kernel takes the directory's lock for
that, which is held by whoever is making a name in it, who waits for the mount.  That is no trouble
while the mount answers.  But when it is killed just then, its thread never comes out of the kernel,
so the mount's connection stays open, and everybody waits for an answer for ever.

So a process of its own, this file run as a program, waits until the mount's main thread has ended,
and ends the connection if threads are left after some seconds.  Programs then get what they get
from every mount that was killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

log = logging.getLogger(__name__)

_PATIENCE = 5.0  # seconds for the threads of a killed process to end


class Watchdog:
    """Watches this process, from the main thread on, while the block runs.

    Args:
        device: the mount's device number, ``major:minor``.
    """

    def __init__(self, device: str) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(os.getpid()), device],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                cwd="/", start_new_session=True,
            )  # fmt: skip
        except OSError as error:  # such as a user who may not run this Python again
            log.warning("nobody will watch this mount: %s", error)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def watch(process: int, device: str) -> None:
    """Return when the main thread of *process*, our parent, has ended and, if need be, the
    connection of its mount."""
    from warabi._core import syscalls

    # Blocked, to be waited for: it may come before we are ready.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    syscalls.signal_when_parent_ends(signal.SIGUSR1)
    if os.getppid() == process and not _main_thread_ended(process):
        signal.sigwait({signal.SIGUSR1})
    deadline = time.monotonic() + _PATIENCE
    while _has_threads(process):
        if time.monotonic() > deadline:
            _abort(device)
            return
        time.sleep(0.05)


def _main_thread_ended(process: int) -> bool:
    """Whether it did before it could be asked for a signal; a thread that is left is our parent
    then, under the same number."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _has_threads(process: int) -> bool:
    """Whether threads are left besides the main one, which ended."""
    try:
        return len(os.listdir(f"/proc/{process}/task")) > 1
    except OSError:
        return False


def _abort(device: str) -> None:
    try:
        Path("/sys/fs/fuse/connections", device.partition(":")[2], "abort").write_text("1")
        return
    except OSError:
        pass  # that file system is not mounted, or not ours to write; root can do it so:
    from warabi._core import syscalls
    from warabifs.frontends.mountinfo import mounts

    for mount in mounts():
        if mount.device == device:
            with contextlib.suppress(OSError):
                syscalls.umount2(mount.path, syscalls.MNT_FORCE)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    watch(int(sys.argv[1]), sys.argv[2])
