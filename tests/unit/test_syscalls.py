"""Every call of ``warabi._core.syscalls`` that fails raises ``OSError`` with the errno."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from warabi._core import syscalls

NOWHERE = 1 << 46
CLOSED = 1 << 30
FAILING: dict[str, tuple[Callable[[], object], int]] = {
    "map_shared": (partial(syscalls.map_shared, CLOSED, 4096, mmap.PROT_READ), errno.EBADF),
    "munmap": (partial(syscalls.munmap, 1, 4096), errno.EINVAL),
    "madvise": (partial(syscalls.madvise, NOWHERE, 4096, mmap.MADV_WILLNEED), errno.ENOMEM),
    "msync": (partial(syscalls.msync, NOWHERE, 4096), errno.ENOMEM),
    "mincore": (partial(syscalls.mincore, NOWHERE, 4096), errno.ENOMEM),
    "fallocate": (partial(syscalls.fallocate, CLOSED, 0, 0, 1), errno.EBADF),
    "syncfs": (partial(syscalls.syncfs, CLOSED), errno.EBADF),
    "is_in_memory": (partial(syscalls.is_in_memory, CLOSED), errno.EBADF),
    "membarrier": (partial(syscalls.membarrier, 1 << 30), errno.EINVAL),
    "mount": (partial(syscalls.mount, "none", "/proc/none", 0, "proc"), errno.ENOENT),
    "umount2": (partial(syscalls.umount2, "/proc/none", 0), errno.ENOENT),
    "signal_when_parent_ends": (partial(syscalls.signal_when_parent_ends, 1 << 20), errno.EINVAL),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_call_that_fails_raises_its_errno(name: str) -> None:
    call, number = FAILING[name]
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        call()
    assert caught.value.errno == number


def test_a_call_that_the_processor_is_not_known_to_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "_MEMBARRIER", None)
    with pytest.raises(OSError, match=f"membarrier: not known for {os.uname().machine}") as caught:
        syscalls.membarrier(0)
    assert caught.value.errno == errno.ENOSYS


def test_signals_do_not_end_a_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real, calls = syscalls._syncfs, []

    def interrupted(fd: int) -> int:
        calls.append(fd)
        if len(calls) < 3:
            raise OSError(errno.EINTR, os.strerror(errno.EINTR))
        return int(real(fd))

    monkeypatch.setattr(syscalls, "_syncfs", interrupted)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        syscalls.syncfs(fd)
    finally:
        os.close(fd)
    assert calls == [fd] * 3


@pytest.mark.parametrize(("path", "expected"), [("/dev/shm", True), ("/proc", False)])
def test_which_file_systems_are_in_memory(path: str, expected: bool) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        assert syscalls.is_in_memory(fd) is expected
    finally:
        os.close(fd)
