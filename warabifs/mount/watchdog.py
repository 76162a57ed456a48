"""A process that aborts the FUSE connection of a killed mount whose threads cannot exit.

A mount invalidates kernel dentries from a thread.  The kernel takes the directory's lock for that,
which a program that creates a name there may hold while it waits for the mount.  This resolves
itself while the mount responds.  But if the mount is killed at that moment, its thread never
leaves the kernel, so the connection stays open, and every program waits for a reply forever.

So a separate process, this file run as a program, waits until the mount's main thread has exited,
and aborts the connection if other threads are left after some seconds.  Programs then get the same
error as from any killed mount.
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


class Watchdog:
    """Watches this process while the block runs; must be used in the main thread.

    Args:
        device: the mount's device number, ``major:minor``.
        number: what tells its file system from later ones with that number, see ``identity``.
    """

    def __init__(self, device: str, number: int) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(os.getpid()), device, str(number)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                cwd="/", start_new_session=True,
            )  # fmt: skip
        except OSError as error:  # for instance a user who may not run this Python again
            log.warning("the mount has no watchdog: %s", error)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def watch(process: int, device: str, number: int) -> None:
    """Return when the main thread of *process*, our parent, has exited; aborts the connection of
    its mount if other threads remain."""
    # Imported when it is known where from: as a program this file runs without site-packages.
    from warabi._core import syscalls
    from warabi._core.tuning import KILLED_PATIENCE, KILLED_POLL

    # Blocked for sigwait(): it may arrive before we wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    syscalls.signal_when_parent_ends(signal.SIGUSR1)
    if os.getppid() == process and not _main_thread_ended(process):
        signal.sigwait({signal.SIGUSR1})
    deadline = time.monotonic() + KILLED_PATIENCE
    while _has_threads(process):
        if time.monotonic() > deadline:
            _abort(device, number)
            return
        time.sleep(KILLED_POLL)


def _main_thread_ended(process: int) -> bool:
    """Whether the main thread exited before prctl(2) requested a signal; then a remaining thread,
    with the same process ID, is our parent."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _has_threads(process: int) -> bool:
    """Whether threads remain besides the main thread, which has exited."""
    try:
        return len(os.listdir(f"/proc/{process}/task")) > 1
    except OSError:
        return False


def _abort(device: str, number: int) -> None:
    from warabi._core import syscalls
    from warabi._core.mountinfo import is_gone, mounts

    if is_gone(device, number):
        return  # the number may belong to another mount by now
    try:
        Path("/sys/fs/fuse/connections", device.partition(":")[2], "abort").write_text("1")
        return
    except OSError:
        pass  # sysfs is not mounted or not writable; root can use umount2(2) instead
    for mount in mounts():
        if mount.device == device:
            with contextlib.suppress(OSError):
                syscalls.umount2(mount.path, syscalls.MNT_FORCE)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    watch(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
