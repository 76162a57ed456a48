"""Files are regions on every kind of source; ``test_regions.py`` has what takes a client."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.mount.support import SOURCES, Mount, fails_with, mounting, run, source_of, wait_until
from tests.mount.together import region_of
from warabi import layout
from warabi.config import FileConfig
from warabi.target import Target

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
    return layout.open_file(FileConfig(path=f"{place}/target", create_if_missing=True))


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
