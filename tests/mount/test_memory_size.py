"""How much memory a mount of ``memory:`` takes at most."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.mount.support import fails_with, mounting, run, wait_until
from tests.mount.test_bad_input import refused
from tests.storage.test_memory_budget import MiB, small_group
from warabi.backends.memory_budget import physical_memory

__all__ = ["small_group"]


def fill(path: Path, most: int) -> int:
    """Write to a new file until that fails with ENOSPC; how many bytes are in it."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        with fails_with(errno.ENOSPC):
            for _ in range(most // (100_000) + 1):
                os.write(fd, bytes(100_000))
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def test_a_size(place: Path) -> None:
    with mounting("memory:", place, "size=20m") as mount:
        free = shutil.disk_usage(mount.path)
        assert free.total == 20 * MiB
        with open(mount.path / "sparse", "wb") as sparse:
            sparse.truncate(1 << 60)  # which takes nothing
        (mount.path / "kept").write_bytes(b"kept" * 100_000)
        assert 10 * MiB < fill(mount.path / "big", 20 * MiB) < 20 * MiB
        assert shutil.disk_usage(mount.path).free < 4 * MiB
        assert (mount.path / "kept").read_bytes() == b"kept" * 100_000
        (mount.path / "big").unlink()

        def emptied() -> bool:
            return shutil.disk_usage(mount.path).free > 15 * MiB

        wait_until(emptied, "the memory that was given back")
        assert 10 * MiB < fill(mount.path / "again", 20 * MiB) < 20 * MiB
        assert mount.unmount() == 0


@pytest.mark.parametrize(("options", "part"), [((), 0.5), (("size=25%",), 0.25), (("size=0",), 1)])
def test_a_part_of_the_memory(options: tuple[str, ...], part: float, place: Path) -> None:
    with mounting("memory:", place, *options) as mount:
        found = shutil.disk_usage(mount.path).total
        if part == 1:
            assert found >= physical_memory()
        else:
            assert found == pytest.approx(physical_memory() * part, rel=1e-3)
        assert mount.unmount() == 0


def test_only_memory_has_a_size(place: Path) -> None:
    (place / "mnt").mkdir()
    for source in (f"file:{place}/target", "na+sm://1-0"):
        assert "only for memory:" in refused(source, place / "mnt", "-o", "size=1m")


def test_a_mount_in_a_control_group_is_not_killed(place: Path, small_group: Path) -> None:
    """By default it has half of the group's memory, and with all of it runs out before."""
    (place / "mnt").mkdir()
    command = [sys.executable, "-m", "warabifs.mount.main", "memory:", str(place / "mnt")]

    def ended() -> bool:
        return not (small_group / "cgroup.procs").read_text()

    join = f'echo $$ > {small_group}/cgroup.procs && exec "$@"'
    for more, low, high in (([], 100, 128), (["-o", "size=0"], 130, 256)):
        run("sh", "-c", join, "sh", *command, *more)
        try:
            assert low * MiB < fill(place / "mnt" / "big", 256 * MiB) < high * MiB
            assert os.listdir(place / "mnt") == ["big"]
        finally:
            run("fusermount3", "-u", place / "mnt")
        wait_until(ended, "the end of the mount's process")


def test_names_in_a_control_group_do_not_kill_the_mount(place: Path, small_group: Path) -> None:
    (place / "mnt").mkdir()
    command = [sys.executable, "-m", "warabifs.mount.main", "memory:", str(place / "mnt")]
    join = f'echo $$ > {small_group}/cgroup.procs && exec "$@"'
    run("sh", "-c", join, "sh", *command)
    made = 0
    try:
        with fails_with(errno.ENOSPC):
            while made < 100_000:
                os.symlink("t" * 4000, place / "mnt" / str(made))
                made += 1
        assert made > 10_000
        assert len(os.listdir(place / "mnt")) == made
    finally:
        run("fusermount3", "-u", place / "mnt")
    wait_until(lambda: not (small_group / "cgroup.procs").read_text(), "the end of the process")
