"""Files are regions on every kind of source; ``test_regions.py`` has what takes a client."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from tests.mount.support import SOURCES, Mount, fails_with, mounting, run, source_of, wait_until
from tests.mount.together import region_of
from warabi.metadata.inode import MOVED, PACKED
from warabi.target import opening
from warabi.target.config import FileConfig
from warabi.target.target import Target
from warabifs.frontends.base import Ability

EVERYWHERE = pytest.mark.parametrize("mounted", SOURCES, indirect=True)
PROVIDED = ("user.warabi.region", "user.warabi.target")


@EVERYWHERE
def test_a_region_keeps_its_id_whatever_happens_to_its_file(mounted: Mount) -> None:
    path = mounted.path / "file"
    path.write_bytes(b"data")
    region, number = region_of(path), path.stat().st_ino
    path.write_bytes(b"other data")
    os.truncate(path, 100_000)
    os.truncate(path, 5)
    path.chmod(0o600)
    (mounted.path / "directory").mkdir()
    run("mv", path, mounted.path / "directory" / "renamed")
    path = mounted.path / "directory" / "renamed"
    assert (region_of(path), path.stat().st_ino) == (region, number)
    assert path.read_bytes() == b"other"


@EVERYWHERE
def test_ln_gives_one_region_two_names(mounted: Mount) -> None:
    path, twin = mounted.path / "file", mounted.path / "twin"
    path.write_bytes(b"data")
    run("ln", path, twin)
    assert region_of(twin) == region_of(path)
    assert twin.stat().st_nlink == 2
    twin.write_bytes(b"by the other name")
    assert path.read_bytes() == b"by the other name"
    path.unlink()
    assert twin.read_bytes() == b"by the other name"


@EVERYWHERE
def test_the_digits_of_a_region_always_mean_it_and_are_no_name(mounted: Mount) -> None:
    path = mounted.path / "file"
    path.write_bytes(b"data")
    digits = mounted.path / region_of(path).hex()
    assert digits.read_bytes() == b"data"
    assert os.path.samefile(digits, path)
    assert os.listdir(mounted.path) == ["file"]
    with fails_with(errno.EPERM):
        digits.unlink()
    path.unlink()
    wait_until(lambda: not digits.exists(), "the end of the region")


@EVERYWHERE
def test_what_the_target_says_of_a_file_is_read_and_not_written(mounted: Mount) -> None:
    path = mounted.path / "file"
    path.write_bytes(b"data")
    before = [os.getxattr(path, name) for name in PROVIDED]
    assert len(before[0]) == 32
    for name in PROVIDED:
        for flags in (0, os.XATTR_CREATE, os.XATTR_REPLACE):
            with fails_with(errno.EPERM, errno.EEXIST):
                os.setxattr(path, name, b"00", flags)
        with fails_with(errno.EPERM):
            os.removexattr(path, name)
    assert [os.getxattr(path, name) for name in PROVIDED] == before
    assert os.listxattr(path) == []
    (mounted.path / "link").symlink_to("file")
    assert os.getxattr(mounted.path / "link", PROVIDED[0]) == before[0]
    assert os.getxattr(mounted.path, PROVIDED[1]) == before[1]
    for nothing in (mounted.path, mounted.path / "link"):
        with fails_with(errno.ENODATA):
            os.getxattr(nothing, PROVIDED[0], follow_symlinks=False)


@pytest.mark.parametrize("kind", ["file", "engine", "tcp"])
def test_a_remounted_file_is_the_same_region(kind: str, place: Path) -> None:
    with source_of(kind, place) as (source, options), mounting(source, place, *options) as mount:
        path = mount.path / "file"
        path.write_bytes(b"data")
        os.link(path, mount.path / "twin")
        region, target = region_of(path), os.getxattr(path, PROVIDED[1])
        mount.remount()
        assert region_of(path) == region_of(mount.path / "twin") == region
        assert os.getxattr(path, PROVIDED[1]) == target
        assert path.read_bytes() == b"data"


def opened(place: Path) -> Target:
    return opening.open_file(FileConfig(path=f"{place}/target", create_if_missing=True))


def test_regions_that_a_program_made_in_a_file_target_are_named_by_a_mount(place: Path) -> None:
    with opened(place) as target:
        regions = [target.create_and_write(text) for text in (b"one", b"two", b"three")]
    with mounting(f"file:{place}/target", place) as mount:
        assert sorted(os.listdir(mount.path)) == sorted(region.hex() for region in regions)
        run("mv", mount.path / regions[0].hex(), mount.path / "one")
        run("ln", mount.path / regions[1].hex(), mount.path / "two")
        run("rm", mount.path / regions[2].hex())
        assert (mount.path / "one").read_bytes() == b"one"
        assert region_of(mount.path / "one") == regions[0]
        (mount.path / "one").write_bytes(b"ONE")
    with opened(place) as target:
        assert list(target.regions()) == regions[:2]
        assert [target.stat(region).names for region in regions[:2]] == [["/one"], ["/two"]]
        assert target.read(regions[0], 0, 3) == b"ONE"


@pytest.mark.parametrize(
    "options",
    [[], pytest.param(["passthrough"], marks=pytest.mark.needs(Ability.PASSTHROUGH))],
    ids=["usual", "passthrough"],
)
def test_regions_that_share_a_file_are_files_like_others(place: Path, options: list[str]) -> None:
    """They are used, grow, get names and are gone as any; what was synced survives ``kill -9``."""
    with opened(place) as target:
        regions = [target.create_and_write(b"%d" % n * 1000) for n in range(6)]
    with mounting(f"file:{place}/target", place, *options) as mount:
        used, grown, cut, gone, mapped, named = (mount.path / r.hex() for r in regions)
        with used.open("r+b", buffering=0) as file:
            assert file.read() == b"0" * 1000
            assert os.pwrite(file.fileno(), b"end", 1500) == 3  # beyond the end
            os.fsync(file.fileno())
            assert used.read_bytes() == b"0" * 1000 + bytes(500) + b"end"
        with grown.open("ab", buffering=0) as file:
            for _ in range(50):
                file.write(b"a" * 1000)
            os.fsync(file.fileno())
        run("truncate", "--size=10", cut)
        run("truncate", "--size=2000", cut)
        run("rm", gone)
        with mapped.open("r+b") as whole, mmap.mmap(whole.fileno(), 1000) as memory:
            memory[:6] = b"mapped"
            memory.flush()
        run("mv", named, mount.path / "name")
        with (mount.path / "name").open("r+b", buffering=0) as file:
            file.write(b"NAME")
            os.fsync(file.fileno())
        with cut.open("rb", buffering=0) as file:
            os.fsync(file.fileno())
        told = {
            used: b"0" * 1000 + bytes(500) + b"end",
            grown: b"1" * 1000 + b"a" * 50_000,
            cut: b"2" * 10 + bytes(1990),
            mapped: b"mapped" + b"4" * 994,
            mount.path / "name": b"NAME" + b"5" * 996,
        }
        assert {path: path.read_bytes() for path in told} == told
        mount.kill()
        run("fusermount3", "-u", "-z", mount.path)
        mount.start()
        assert {path: path.read_bytes() for path in told} == told
        assert sorted(os.listdir(mount.path)) == sorted(path.name for path in told)
    with opened(place) as target:
        inodes = {region: target._catalogue.region(region) for region in target.regions()}
        kinds = {region: inode.packed for region, inode in inodes.items() if inode is not None}
        assert kinds.pop(regions[1]) == MOVED
        assert set(kinds.values()) <= {PACKED, MOVED}
        assert regions[3] not in kinds
