"""A target in a pool is mounted as any other, on one host at a time."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

from tests.mount.support import Mount, mounting, run
from tests.mount.test_fsx import Exerciser
from tests.support.helpers import pattern
from warabi._core.syscalls import fallocate

pytestmark = pytest.mark.timeout(180)


def source() -> str:
    return f"rados:warabi/{uuid.uuid4().hex}"


def test_a_file_that_is_used_in_every_way_holds_what_it_should(pool: Path, place: Path) -> None:
    with mounting(source(), place) as mount:
        exerciser = Exerciser(mount.path, 7, allocates=False)
        try:
            exerciser.run(1500)
        finally:
            exerciser.close()
        assert mount.unmount() == 0


def test_programs_find_what_they_stored_after_the_next_mount(pool: Path, place: Path) -> None:
    tree = place / "tree"
    tree.mkdir()
    for number in range(40):
        (tree / f"{number}").write_bytes(pattern(5000 * number, number))
    with mounting(source(), place) as mount:
        run("cp", "-a", tree, mount.path)
        mount.remount()
        run("diff", "-r", tree, mount.path / "tree")
        run("truncate", "-s", "100G", mount.path / "sparse")
        assert (mount.path / "sparse").stat().st_size == 100 << 30
        run("rm", mount.path / "sparse")
        with open(mount.path / "file", "wb") as file:
            with pytest.raises(OSError, match="not supported"):
                fallocate(file.fileno(), 0, 0, 1 << 20)
            os.posix_fallocate(file.fileno(), 0, 1 << 20)  # which writes where it cannot allocate
        assert (mount.path / "file").read_bytes() == bytes(1 << 20)
        assert os.statvfs(mount.path).f_bavail > 0


def test_what_was_synced_survives_the_kill_of_a_mount(pool: Path, place: Path) -> None:
    with mounting(source(), place) as mount:
        with open(mount.path / "file", "wb") as file:
            file.write(pattern(3 << 20))
            file.flush()
            os.fsync(file.fileno())
        mount.kill()
        run("fusermount3", "-u", "-z", mount.path)
        mount.start()  # when the dead owner has said nothing for long enough
        assert (mount.path / "file").read_bytes() == pattern(3 << 20)


def test_a_second_mount_is_refused(pool: Path, place: Path) -> None:
    where, other = source(), place / "other"
    other.mkdir()
    with mounting(where, place) as mount:
        (mount.path / "file").write_bytes(b"1234")
        second = Mount(where, other, place / "other.log")
        refused = run(*second.command(), check=False)
        assert refused.returncode == 1
        assert "already open in process" in refused.stderr
        assert (mount.path / "file").read_bytes() == b"1234"
