"""Ownership of a target on a file system: one ``flock`` per target."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path

from warabi._core import forks, interrupts
from warabi._core.tuning import CLOSING_PATIENCE, DEAD_PATIENCE, LOCK_POLL
from warabi.errors import TargetBusy
from warabi.metadata.journal import close_quietly


def _is_dead(pid: str) -> bool:
    try:
        state = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    except (ValueError, OSError):
        return False
    return state in "ZX"


class LockFile:
    """Exclusive ownership of a target, as long as this object or its process lives."""

    def __init__(self, path: Path, file: Path, patience: float) -> None:
        self._file = file
        self._fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + patience
        closing_deadline = time.monotonic() + (CLOSING_PATIENCE if patience else 0.0)
        dead_deadline = time.monotonic() + max(patience, DEAD_PATIENCE)
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    close_quietly(self._fd)
                    raise
            owner = os.pread(self._fd, 100, 0).decode(errors="replace").strip()
            limit = closing_deadline if owner.endswith("closing") else deadline
            if _is_dead(owner.partition(",")[0]):
                limit = dead_deadline
            if time.monotonic() >= limit:
                close_quietly(self._fd)
                raise TargetBusy(f"target {path}: already open in process {owner or 'unknown'}")
            interrupts.check()
            time.sleep(LOCK_POLL)
        forks.register(self)
        try:
            self._write(f"{os.getpid()}\n")
        except BaseException:
            self.release()
            raise

    def _forked(self) -> None:
        if self._fd >= 0:
            forks.disconnect([self._fd])

    def _write(self, text: str) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text.encode(), 0)

    def closing(self) -> None:
        """Tell waiting processes that the owner is closing, if that can be written."""
        with contextlib.suppress(OSError):
            self._write(f"{os.getpid()}, which is closing\n")

    def remove(self) -> None:
        self._file.unlink(missing_ok=True)

    def release(self) -> None:
        # Explicitly unlocked before closing: a child that was not forked by Python also has the
        # descriptor, and close(2) does not release the lock while that is open.
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)
            close_quietly(fd)
