"""The tree of names over a target's regions."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.helpers import open_memory
from warabi import errors
from warabi._core.attributes import ROOT, Attributes
from warabi.metadata import dentries
from warabi.metadata.namespace import Namespace
from warabi.metadata.tree import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from warabi.region import RegionID
from warabi.target import opening
from warabi.target.config import FileConfig, MemoryConfig
from warabi.target.target import Target

BACKENDS: dict[str, Callable[[Path], Target]] = {
    "memory": lambda path: open_memory(MemoryConfig()),
    "file": lambda path: opening.open_file(FileConfig(path=str(path), create_if_missing=True)),
}


@pytest.fixture(params=BACKENDS)
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Target]:
    with BACKENDS[request.param](tmp_path / "target") as made:
        yield made


@pytest.fixture
def names(target: Target) -> Namespace:
    return target.namespace


def fails(number: int) -> pytest.RaisesExc[errors.PathError]:
    return pytest.RaisesExc(errors.PathError, check=lambda error: error.errno == number)


def mkfile(names: Namespace, parent: int, name: bytes, pin: bool = False) -> Attributes:
    return names.mknod(parent, name, 0o644, 1, 2, pin=pin)


def listing(names: Namespace, ino: int = ROOT) -> list[bytes]:
    return [name for name, _ in names.readdir(ino)]


# Making and finding


def test_root(names: Namespace) -> None:
    root = names.getattr(ROOT)
    assert stat.S_ISDIR(root.mode)
    assert (root.nlink, root.uid, root.gid) == (2, os.getuid(), os.getgid())
    assert listing(names) == []


def test_mknod_makes_an_empty_region(target: Target, names: Namespace) -> None:
    made = names.mknod(ROOT, b"f", 0o4640, 7, 8)
    assert made.mode == stat.S_IFREG | 0o4640
    assert (made.uid, made.gid, made.size, made.nlink) == (7, 8, 0, 1)
    assert names.lookup(ROOT, b"f") == names.getattr(made.ino) == made
    assert target.list() == [made.region]
    assert target.stat(made.region).names == ["/f"]


@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK])
def test_special_files_are_no_regions(target: Target, names: Namespace, kind: int) -> None:
    made = names.mknod(ROOT, b"special", kind | 0o600, 0, 0, rdev=1281)
    assert (made.mode, made.rdev) == (kind | 0o600, 1281)
    assert target.list() == []
    with fails(errno.EINVAL):
        names.open_name("/special")
    names.unlink(ROOT, b"special")


def test_mknod_of_what_is_no_file_type(names: Namespace) -> None:
    for mode in (stat.S_IFDIR, stat.S_IFLNK, 0o170000):
        with fails(errno.EINVAL):
            names.mknod(ROOT, b"x", mode | 0o600, 0, 0)
    assert listing(names) == []


def test_directories_count_their_subdirectories(names: Namespace) -> None:
    one = names.mkdir(ROOT, b"one", 0o750, 3, 4)
    assert (one.mode, one.nlink, one.uid, one.gid) == (stat.S_IFDIR | 0o750, 2, 3, 4)
    two = names.mkdir(one.ino, b"two", 0o700, 0, 0)
    mkfile(names, one.ino, b"file")
    assert names.getattr(one.ino).nlink == 3
    assert names.getattr(ROOT).nlink == 3
    names.rmdir(one.ino, b"two")
    assert names.getattr(one.ino).nlink == 2
    with fails(errno.ESTALE):
        names.getattr(two.ino)


def test_set_group_id_directories_pass_their_group_on(names: Namespace) -> None:
    parent = names.mkdir(ROOT, b"d", 0o2755, 1, 50).ino
    assert mkfile(names, parent, b"f").gid == 50
    inner = names.mkdir(parent, b"sub", 0o755, 1, 2)
    assert (inner.gid, inner.mode & 0o7777) == (50, 0o2755)
    assert names.symlink(parent, b"l", b"t", 1, 2).gid == 50


@pytest.mark.parametrize(
    ("name", "number"),
    [
        (b"", errno.EINVAL),
        (b".", errno.EINVAL),
        (b"..", errno.EINVAL),
        (b"a/b", errno.EINVAL),
        (b"a\0b", errno.EINVAL),
        (b"n" * 256, errno.ENAMETOOLONG),
    ],
)
def test_names_that_cannot_be(target: Target, names: Namespace, name: bytes, number: int) -> None:
    made = mkfile(names, ROOT, b"there")
    calls: list[Callable[[], object]] = [
        lambda: mkfile(names, ROOT, name),
        lambda: names.mkdir(ROOT, name, 0o755, 0, 0),
        lambda: names.symlink(ROOT, name, b"t", 0, 0),
        lambda: names.link(made.ino, ROOT, name),
        lambda: names.rename(ROOT, b"there", ROOT, name),
    ]
    for call in calls:
        with fails(number):
            call()
    assert listing(names) == [b"there"]
    assert len(target.list()) == 1


def test_longest_name_and_any_bytes(names: Namespace) -> None:
    for name in (b"n" * 255, bytes(range(1, 47)) + bytes(range(48, 256)), b" ", b"\xff"):
        mkfile(names, ROOT, name)
        assert names.lookup(ROOT, name)


def test_taken_names(names: Namespace) -> None:
    made = mkfile(names, ROOT, b"x")
    calls: list[Callable[[], object]] = [
        lambda: mkfile(names, ROOT, b"x"),
        lambda: names.mkdir(ROOT, b"x", 0o755, 0, 0),
        lambda: names.symlink(ROOT, b"x", b"t", 0, 0),
        lambda: names.link(made.ino, ROOT, b"x"),
    ]
    for call in calls:
        with fails(errno.EEXIST):
            call()


def test_invalid_parents_are_refused(names: Namespace) -> None:
    file = mkfile(names, ROOT, b"f").ino
    calls: list[Callable[[int], object]] = [
        lambda parent: mkfile(names, parent, b"x"),
        lambda parent: names.lookup(parent, b"x"),
        lambda parent: names.readdir(parent),
        lambda parent: names.unlink(parent, b"x"),
        lambda parent: names.rmdir(parent, b"x"),
        lambda parent: names.rename(ROOT, b"f", parent, b"x"),
        lambda parent: names.link(file, parent, b"x"),
    ]
    wrong = {file: errno.ENOTDIR}
    wrong |= dict.fromkeys((12345, -1, 0, 1 << 63), errno.ESTALE)
    for parent, number in wrong.items():
        for call in calls:
            with fails(number):
                call(parent)


def test_symlinks(names: Namespace) -> None:
    made = names.symlink(ROOT, b"l", b"/some/\xff where", 0, 0)
    assert made.mode == stat.S_IFLNK | 0o777
    assert made.size == 13
    assert names.readlink(made.ino) == b"/some/\xff where"
    with fails(errno.EINVAL):
        names.readlink(ROOT)
    with fails(errno.EINVAL):
        names.open_name("/l")
    with fails(errno.ENOENT):
        names.symlink(ROOT, b"m", b"", 0, 0)
    with fails(errno.ENAMETOOLONG):
        names.symlink(ROOT, b"m", b"x" * 4096, 0, 0)
    names.unlink(ROOT, b"l")


def test_setattr_changes_what_is_given(names: Namespace) -> None:
    made = mkfile(names, ROOT, b"f")
    assert names.setattr(made.ino, mode=0o600).mode == stat.S_IFREG | 0o600
    changed = names.setattr(made.ino, uid=5, atime_ns=10, mtime_ns=-20)
    assert (changed.uid, changed.gid, changed.atime_ns, changed.mtime_ns) == (5, 2, 10, -20)
    assert changed.ctime_ns >= made.ctime_ns
    assert names.setattr(made.ino).mode == stat.S_IFREG | 0o600


# Links


def test_hard_links(target: Target, names: Namespace) -> None:
    made = mkfile(names, ROOT, b"a")
    inner = names.mkdir(ROOT, b"d", 0o755, 0, 0).ino
    assert names.link(made.ino, inner, b"b").nlink == 2
    assert names.lookup(inner, b"b").ino == made.ino
    assert sorted(target.stat(made.region).names) == ["/a", "/d/b"]
    assert names.unlink(ROOT, b"a").nlink == 1
    assert target.list() == [made.region]
    assert names.unlink(inner, b"b").nlink == 0
    assert target.list() == []
    with fails(errno.EPERM):
        names.link(inner, ROOT, b"other")


def test_unlink_of_what_cannot_be(names: Namespace) -> None:
    names.mkdir(ROOT, b"d", 0o755, 0, 0)
    with fails(errno.EISDIR):
        names.unlink(ROOT, b"d")
    with fails(errno.ENOENT):
        names.unlink(ROOT, b"nothing")
    mkfile(names, ROOT, b"f")
    with fails(errno.ENOTDIR):
        names.rmdir(ROOT, b"f")


def test_rmdir_needs_an_empty_directory(names: Namespace) -> None:
    inner = names.mkdir(ROOT, b"d", 0o755, 0, 0).ino
    mkfile(names, inner, b"f")
    with fails(errno.ENOTEMPTY):
        names.rmdir(ROOT, b"d")
    names.unlink(inner, b"f")
    names.rmdir(ROOT, b"d")
    with fails(errno.ENOENT):
        names.lookup(ROOT, b"d")


def test_pinned_files_outlive_their_names(target: Target, names: Namespace) -> None:
    made = mkfile(names, ROOT, b"f", pin=True)
    target.write(made.region, 0, b"data", extend=True)
    assert names.unlink(ROOT, b"f").nlink == 0
    assert listing(names) == []
    assert target.read(made.region, 0, 4) == b"data"
    assert names.getattr(made.ino).size == 4
    with fails(errno.ENOENT):
        names.link(made.ino, ROOT, b"again")
    names.pin(made.ino)
    names.unpin(made.ino)
    assert target.read(made.region, 0, 4) == b"data"
    names.unpin(made.ino)
    with pytest.raises(errors.InvalidRegion):
        target.read(made.region, 0, 4)
    names.unpin(made.ino)  # of a gone inode: no effect


def test_unlink_that_holds(target: Target, names: Namespace) -> None:
    made = mkfile(names, ROOT, b"f")
    names.unlink(ROOT, b"f", hold=True)
    assert target.size(made.region) == 0
    names.unpin(made.ino)
    assert target.list() == []
    inner = names.mkdir(ROOT, b"d", 0o755, 0, 0)
    names.rmdir(ROOT, b"d", hold=True)
    assert names.getattr(inner.ino).nlink == 0
    with fails(errno.ENOENT):
        mkfile(names, inner.ino, b"in a removed directory")
    names.unpin(inner.ino)
    with fails(errno.ESTALE):
        names.getattr(inner.ino)


def test_hold_of_a_file_with_more_names_pins_nothing(target: Target, names: Namespace) -> None:
    made = mkfile(names, ROOT, b"a")
    names.link(made.ino, ROOT, b"b")
    assert names.unlink(ROOT, b"a", hold=True).nlink == 1
    names.unlink(ROOT, b"b")
    assert target.list() == []


# Renames


def test_rename_moves_and_replaces(target: Target, names: Namespace) -> None:
    first, second = mkfile(names, ROOT, b"a"), mkfile(names, ROOT, b"b")
    assert names.rename(ROOT, b"a", ROOT, b"c") is None
    replaced = names.rename(ROOT, b"c", ROOT, b"b")
    assert replaced is not None
    assert (replaced.ino, replaced.nlink) == (second.ino, 0)
    assert listing(names) == [b"b"]
    assert target.list() == [first.region]
    assert names.lookup(ROOT, b"b").nlink == 1


def test_rename_holds_what_it_replaces(target: Target, names: Namespace) -> None:
    mkfile(names, ROOT, b"a")
    second = mkfile(names, ROOT, b"b")
    names.rename(ROOT, b"a", ROOT, b"b", hold=True)
    assert target.size(second.region) == 0
    names.unpin(second.ino)
    with pytest.raises(errors.InvalidRegion):
        target.size(second.region)


def test_rename_of_directories(names: Namespace) -> None:
    one = names.mkdir(ROOT, b"one", 0o755, 0, 0).ino
    two = names.mkdir(ROOT, b"two", 0o755, 0, 0).ino
    names.rename(ROOT, b"one", two, b"inner")
    assert (names.getattr(ROOT).nlink, names.getattr(two).nlink) == (3, 3)
    deep = names.mkdir(one, b"deep", 0o755, 0, 0).ino
    for into in (two, one, deep):
        with fails(errno.EINVAL):
            names.rename(ROOT, b"two", into, b"loop")
        with fails(errno.EINVAL):
            names.rename(ROOT, b"two", into, b"deep", RENAME_EXCHANGE)
    empty = names.mkdir(ROOT, b"empty", 0o755, 0, 0).ino
    with fails(errno.ENOTEMPTY):
        names.rename(ROOT, b"empty", ROOT, b"two")
    names.rename(two, b"inner", ROOT, b"empty")
    with fails(errno.ESTALE):
        names.getattr(empty)
    assert (names.getattr(ROOT).nlink, names.getattr(two).nlink) == (4, 2)


def test_rename_between_kinds(names: Namespace) -> None:
    mkfile(names, ROOT, b"f")
    names.mkdir(ROOT, b"d", 0o755, 0, 0)
    with fails(errno.EISDIR):
        names.rename(ROOT, b"f", ROOT, b"d")
    with fails(errno.ENOTDIR):
        names.rename(ROOT, b"d", ROOT, b"f")
    with fails(errno.ENOENT):
        names.rename(ROOT, b"x", ROOT, b"y")


def test_rename_of_two_names_of_one_file_keeps_both(names: Namespace) -> None:
    made = mkfile(names, ROOT, b"a")
    names.link(made.ino, ROOT, b"b")
    assert names.rename(ROOT, b"a", ROOT, b"b") is None
    assert names.rename(ROOT, b"a", ROOT, b"a") is None
    assert listing(names) == [b"a", b"b"]


def test_rename_noreplace(names: Namespace) -> None:
    mkfile(names, ROOT, b"a")
    mkfile(names, ROOT, b"b")
    with fails(errno.EEXIST):
        names.rename(ROOT, b"a", ROOT, b"b", RENAME_NOREPLACE)
    with fails(errno.EEXIST):
        names.rename(ROOT, b"a", ROOT, b"a", RENAME_NOREPLACE)
    names.rename(ROOT, b"a", ROOT, b"c", RENAME_NOREPLACE)
    assert listing(names) == [b"b", b"c"]
    with fails(errno.EINVAL):
        names.rename(ROOT, b"b", ROOT, b"d", RENAME_NOREPLACE | RENAME_EXCHANGE)
    with fails(errno.EINVAL):
        names.rename(ROOT, b"b", ROOT, b"d", 8)


def test_rename_leaves_a_whiteout(names: Namespace) -> None:
    made = mkfile(names, ROOT, b"a")
    names.rename(ROOT, b"a", ROOT, b"b", RENAME_WHITEOUT)
    hole = names.lookup(ROOT, b"a")
    assert (stat.S_IFMT(hole.mode), hole.rdev, hole.nlink) == (stat.S_IFCHR, 0, 1)
    assert names.lookup(ROOT, b"b").ino == made.ino
    with fails(errno.EINVAL):
        names.rename(ROOT, b"b", ROOT, b"a", RENAME_WHITEOUT | RENAME_EXCHANGE)
    with fails(errno.EEXIST):
        names.rename(ROOT, b"b", ROOT, b"a", RENAME_WHITEOUT | RENAME_NOREPLACE)


def test_rename_exchange(names: Namespace) -> None:
    file = mkfile(names, ROOT, b"f").ino
    outer = names.mkdir(ROOT, b"outer", 0o755, 0, 0).ino
    inner = names.mkdir(outer, b"inner", 0o755, 0, 0).ino
    mkfile(names, inner, b"content")
    names.rename(ROOT, b"f", outer, b"inner", RENAME_EXCHANGE)
    assert names.lookup(ROOT, b"f").ino == inner
    assert names.lookup(outer, b"inner").ino == file
    assert (names.getattr(ROOT).nlink, names.getattr(outer).nlink) == (4, 2)
    assert names.getattr(file).nlink == 1
    with fails(errno.ENOENT):
        names.rename(ROOT, b"f", ROOT, b"nothing", RENAME_EXCHANGE)


# Listing


def test_readdir_pages(names: Namespace) -> None:
    inner = names.mkdir(ROOT, b"d", 0o755, 0, 0).ino
    want = sorted(b"%d" % i for i in range(57))
    for name in want:
        mkfile(names, inner, name)
    for limit in (1, 2, 56, 57, 58, 1000):
        got: list[bytes] = []
        while page := names.readdir(inner, got[-1] if got else b"", limit):
            assert len(page) <= limit
            got += [name for name, _ in page]
        assert got == want
    assert names.readdir(inner)[0][1] == names.lookup(inner, want[0])


def test_readdir_shows_nameless_regions_in_the_root_after_the_names(
    target: Target, names: Namespace
) -> None:
    nameless = [target.create(i) for i in range(20)]
    named = [b"zz", b"a", b"0" * 32, b"f" * 32, b"e" * 31]
    for name in named:
        mkfile(names, ROOT, name)
    inner = names.mkdir(ROOT, b"d", 0o755, 0, 0).ino
    want = [*sorted([*named, b"d"]), *(region.hex().encode() for region in nameless)]
    for limit in (1, 3, 6, 7, 26, 1000):
        got: list[bytes] = []
        while page := names.readdir(ROOT, got[-1] if got else b"", limit):
            got += [name for name, _ in page]
        assert got == want
    assert listing(names, inner) == []
    for name, attributes in names.readdir(ROOT):
        assert names.lookup(ROOT, name) == attributes
        assert attributes.nlink == (2 if name == b"d" else 1)


def test_readdir_continues_after_removed_and_unknown_names(
    target: Target, names: Namespace
) -> None:
    region = target.create(1)
    for name in (b"a", b"b", b"c"):
        mkfile(names, ROOT, name)
    names.unlink(ROOT, b"b")
    assert [name for name, _ in names.readdir(ROOT, b"b")] == [b"c", region.hex().encode()]
    assert names.readdir(ROOT, b"f" * 32) == []
    assert names.readdir(ROOT, b"a", 0) != []  # the limit is at least 1


# Hex names


def test_hex_name_means_its_region(target: Target, names: Namespace) -> None:
    region = target.create(5)
    hexname = region.hex().encode()
    found = names.lookup(ROOT, hexname)
    assert (found.region, found.nlink, found.size) == (region, 1, 5)
    assert names.open_name(region.hex()) == region
    inner = names.mkdir(ROOT, b"d", 0o755, 0, 0).ino
    for parent, name in ((inner, hexname), (ROOT, hexname.upper()), (ROOT, b"0" * 32)):
        with fails(errno.ENOENT):
            names.lookup(parent, name)
    with fails(errno.EEXIST):
        mkfile(names, ROOT, hexname)


def test_moving_a_hex_name_names_the_region(target: Target, names: Namespace) -> None:
    region = target.create(5)
    hexname = region.hex().encode()
    names.rename(ROOT, hexname, ROOT, b"named")
    assert listing(names) == [b"named"]
    assert target.stat(region).names == ["/named"]
    assert names.lookup(ROOT, b"named").nlink == 1
    # It still means the region, is not listed, and takes nothing away.
    assert names.lookup(ROOT, hexname).region == region
    with fails(errno.EPERM):
        names.unlink(ROOT, hexname)
    with fails(errno.EPERM):
        names.rename(ROOT, hexname, ROOT, b"other")
    assert names.rename(ROOT, hexname, ROOT, b"named") is None
    assert target.stat(region).names == ["/named"]
    names.unlink(ROOT, b"named")
    with pytest.raises(errors.InvalidRegion):
        target.size(region)
    with fails(errno.ENOENT):
        names.lookup(ROOT, hexname)


def test_linking_a_nameless_region_names_it(target: Target, names: Namespace) -> None:
    region = target.create(5)
    made = names.link(names.lookup(ROOT, region.hex().encode()).ino, ROOT, b"named")
    assert made.nlink == 1
    assert listing(names) == [b"named"]


def test_unlinking_a_hex_name_erases_a_nameless_region(target: Target, names: Namespace) -> None:
    region = target.create(5)
    names.unlink(ROOT, region.hex().encode())
    assert target.list() == []
    assert listing(names) == []
    region = target.create(5)
    names.unlink(ROOT, region.hex().encode(), hold=True)
    assert target.size(region) == 5
    assert listing(names) == []
    names.unpin(region.slot)
    assert target.list() == []


def test_hex_names_that_mean_no_region_are_ordinary(target: Target, names: Namespace) -> None:
    name = b"0123456789abcdef" * 2
    made = mkfile(names, ROOT, name)
    assert names.lookup(ROOT, name).ino == made.ino
    assert listing(names) == [name]
    names.rename(ROOT, name, ROOT, b"f" * 32)
    names.unlink(ROOT, b"f" * 32)
    assert target.list() == []


def test_replacing_by_hex_name(target: Target, names: Namespace) -> None:
    region, other = target.create(1), target.create(2)
    mkfile(names, ROOT, b"f")
    names.rename(ROOT, b"f", ROOT, region.hex().encode())  # erases that region
    with pytest.raises(errors.InvalidRegion):
        target.size(region)
    assert listing(names) == [region.hex().encode(), other.hex().encode()]
    with fails(errno.EINVAL):
        names.rename(ROOT, region.hex().encode(), ROOT, other.hex().encode(), RENAME_EXCHANGE)


# Extended attributes


def test_xattrs(names: Namespace) -> None:
    made = mkfile(names, ROOT, b"f").ino
    with fails(errno.ENODATA):
        names.getxattr(made, b"user.a")
    names.setxattr(made, b"user.b", b"\0\xff")
    names.setxattr(made, b"user.a", b"")
    names.setxattr(made, b"user.a", b"again")
    assert names.getxattr(made, b"user.a") == b"again"
    assert names.getxattr(made, b"user.b") == b"\0\xff"
    assert names.listxattr(made) == [b"user.a", b"user.b"]
    names.removexattr(made, b"user.a")
    with fails(errno.ENODATA):
        names.removexattr(made, b"user.a")
    assert names.listxattr(made) == [b"user.b"]
    assert names.listxattr(ROOT) == []
    names.unlink(ROOT, b"f")
    with fails(errno.ESTALE):
        names.getxattr(made, b"user.b")


def test_region_and_target_are_attributes_that_cannot_be_set(
    target: Target, names: Namespace
) -> None:
    made = mkfile(names, ROOT, b"f")
    assert names.getxattr(made.ino, b"user.warabi.region") == made.region.hex().encode()
    assert names.getxattr(made.ino, b"user.warabi.target") == target.uuid.encode()
    assert names.getxattr(ROOT, b"user.warabi.target") == target.uuid.encode()
    with fails(errno.ENODATA):
        names.getxattr(ROOT, b"user.warabi.region")
    for name in (b"user.warabi.region", b"user.warabi.target"):
        with fails(errno.EPERM):
            names.setxattr(made.ino, name, b"x")
        with fails(errno.EPERM):
            names.removexattr(made.ino, name)


# Paths


def test_paths(target: Target, names: Namespace) -> None:
    inner = names.mkdir(ROOT, b"d", 0o755, 0, 0).ino
    made = mkfile(names, inner, b"f")
    for path in ("/d/f", "d/f", "//d///f", "./d/./f", "/d/f/"):
        assert names.open_name(path) == made.region
    assert names.resolve("/").ino == names.resolve("").ino == ROOT
    for path, number in (("/d", errno.EISDIR), ("/", errno.EISDIR), ("/d/x", errno.ENOENT),
                         ("/d/f/x", errno.ENOTDIR), ("/x/f", errno.ENOENT)):  # fmt: skip
        with fails(number):
            names.open_name(path)
    names.link_name(made.region, "/d/other")
    assert listing(names, inner) == [b"f", b"other"]
    with pytest.raises(errors.InvalidRegion):
        names.link_name(RegionID(), "/x")
    names.unlink_name("/d/f")
    names.rename(ROOT, b"d", ROOT, b"e")
    assert target.stat(made.region).names == ["/e/other"]


def test_times_of_directories_follow_their_entries(names: Namespace) -> None:
    inner = names.mkdir(ROOT, b"d", 0o755, 0, 0).ino
    names.setattr(inner, mtime_ns=0, atime_ns=0)
    made = mkfile(names, inner, b"f")
    assert names.getattr(inner).mtime_ns > 0
    names.setattr(inner, mtime_ns=0)
    names.setattr(made.ino, mtime_ns=5)
    assert names.getattr(inner).mtime_ns == 0
    names.unlink(inner, b"f")
    assert names.getattr(inner).mtime_ns > 0


def test_quota_leaves_no_name_behind(tmp_path: Path) -> None:
    with open_memory(MemoryConfig(capacity=10)) as target:
        made = mkfile(target.namespace, ROOT, b"f")
        with pytest.raises(errors.StorageFull):
            target.write(made.region, 0, bytes(11), extend=True)
        assert target.namespace.getattr(made.ino).size == 0
        target.write(made.region, 0, bytes(10), extend=True)
        assert target.room()[1] == 0


def test_everything_survives_a_reopening(tmp_path: Path) -> None:
    path = tmp_path / "target"
    with BACKENDS["file"](path) as target:
        names = target.namespace
        inner = names.mkdir(ROOT, b"d", 0o2750, 5, 6)
        made = mkfile(names, inner.ino, b"\xff")
        names.link(made.ino, ROOT, b"second")
        names.symlink(ROOT, b"l", b"d/x", 1, 1)
        names.mknod(ROOT, b"fifo", stat.S_IFIFO | 0o600, 0, 0)
        names.setxattr(made.ino, b"user.x", b"y")
        names.setattr(made.ino, mtime_ns=1, atime_ns=-1)
        nameless = target.create(3)
        held = mkfile(names, ROOT, b"held", pin=True)
        names.unlink(ROOT, b"held")
        before = (names.readdir(ROOT), names.readdir(inner.ino), names.getattr(ROOT))
    with BACKENDS["file"](path) as target:
        names = target.namespace
        assert (names.readdir(ROOT), names.readdir(inner.ino), names.getattr(ROOT)) == before
        assert names.readlink(names.lookup(ROOT, b"l").ino) == b"d/x"
        assert names.getxattr(made.ino, b"user.x") == b"y"
        assert target.list() == [made.region, nameless]
        with pytest.raises(errors.InvalidRegion):
            target.size(held.region)
        fresh = mkfile(names, ROOT, b"fresh")
        assert fresh.region not in (made.region, nameless, held.region)


def test_more_names_than_are_kept_in_memory(names: Namespace) -> None:
    directory = names.mkdir(ROOT, b"many", 0o755, 0, 0).ino
    made = {
        b"%d" % number: names.mknod(directory, b"%d" % number, stat.S_IFIFO | 0o644, 0, 0).ino
        for number in range(70_000)
    }
    for name in list(made)[::3]:
        names.unlink(directory, name)
        del made[name]
    names.rename(directory, b"1", directory, b"0")
    made[b"0"] = made.pop(b"1")
    for name in (b"1", b"3", b"69999"):
        with fails(errno.ENOENT):
            names.lookup(directory, name)
    assert {name: names.lookup(directory, name).ino for name in made} == made
    listed: dict[bytes, int] = {}
    while page := names.readdir(directory, max(listed, default=b""), 10_000):
        listed |= {name: attributes.ino for name, attributes in page}
    assert listed == made


def test_names_that_were_not_written_back_are_found_in_every_way(names: Namespace) -> None:
    directory = names.mkdir(ROOT, b"directory", 0o755, 0, 0).ino
    file = mkfile(names, directory, b"file")
    with fails(errno.ENOTEMPTY):
        names.rmdir(ROOT, b"directory")
    names.link(file.ino, ROOT, b"link")
    assert names.lookup(directory, b"..").ino == ROOT
    assert listing(names) == [b"directory", b"link"]
    names.unlink(directory, b"file")
    names.rmdir(ROOT, b"directory")
    assert listing(names) == [b"link"]


def test_an_erased_region_takes_names_that_were_not_written_back(
    target: Target, names: Namespace
) -> None:
    file = mkfile(names, ROOT, b"a")
    names.link(file.ino, ROOT, b"b")
    target.erase(file.region)
    for name in (b"a", b"b"):
        with fails(errno.ENOENT):
            names.lookup(ROOT, name)
    assert mkfile(names, ROOT, b"a").ino != file.ino


def test_absent_names_are_distinguished_from_evicted_names(
    target: Target, names: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dentries, "_KEPT", 20)
    new = names.mkdir(ROOT, b"new", 0o755, 1, 2).ino
    with fails(errno.ENOENT):
        names.lookup(new, b"file 0")
    for number in range(50):
        mkfile(names, new, b"file %d" % number)
        target.sync()
    old = names.mkdir(ROOT, b"old", 0o755, 1, 2).ino
    for directory in (new, old):
        for number in range(50):
            with fails(errno.EEXIST) if directory == new else contextlib.nullcontext():
                mkfile(names, directory, b"file %d" % number)
        with fails(errno.ENOENT):
            names.lookup(directory, b"file 50")
        assert len(listing(names, directory)) == 50
    for number in range(0, 50, 2):
        names.unlink(new, b"file %d" % number)
    found = [number for number in range(50) if exists(names, new, b"file %d" % number)]
    assert found == list(range(1, 50, 2))


def exists(names: Namespace, directory: int, name: bytes) -> bool:
    try:
        names.lookup(directory, name)
    except errors.PathError as error:
        return error.errno != errno.ENOENT
    return True


def test_the_cost_of_an_attribute_does_not_grow_with_their_number(target: Target) -> None:
    """In steps of SQLite's virtual machine; the room for attributes is checked each time."""
    ino, database, steps = target.create(0).slot, target._catalogue._db, 0

    def step() -> int:
        nonlocal steps
        steps += 1
        return 0

    def cost(name: bytes) -> int:
        nonlocal steps
        steps = 0
        database.set_progress_handler(step, 1)
        try:
            target.namespace.setxattr(ino, name, b"value")
        finally:
            database.set_progress_handler(None, 1)
        return steps

    costs = []
    for number in range(600):
        costs.append(cost(b"user.%03d" % number))
    assert max(costs[300:]) <= max(costs[2:10]), costs
    assert cost(b"user.007") <= 2 * max(costs[2:10])


def test_the_room_for_attributes_is_what_the_others_leave(target: Target) -> None:
    names, catalogue, dice = target.namespace, target._catalogue, random.Random(1)
    inodes = [target.create(0).slot for _ in range(3)]

    def stored(ino: int, but: bytes) -> tuple[int, int]:
        found = [(name, names.getxattr(ino, name)) for name in names.listxattr(ino) if name != but]
        return sum(len(name) + 1 for name, _ in found), sum(len(value) for _, value in found)

    for number in range(600):
        ino, name = dice.choice(inodes), b"user." + b"x" * dice.randrange(1, 9)
        if dice.random() < 0.3:
            with contextlib.suppress(errors.PathError):
                names.removexattr(ino, name)
        else:
            names.setxattr(ino, name, dice.randbytes(dice.randrange(100)))
        if number % 50 == 0:
            catalogue._xattr_totals.clear()  # as when there are too many inodes
        name = b"user." + b"x" * dice.randrange(1, 9)
        assert catalogue.xattr_bytes(ino, name) == stored(ino, name)
    region = target.list()[0]
    target.erase(region)
    assert catalogue.xattr_bytes(region.slot, b"user.x") == (0, 0)


def test_an_attribute_that_is_not_stored_takes_no_room(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    ino, catalogue = target.create(0).slot, target._catalogue
    target.namespace.setxattr(ino, b"user.a", b"value")

    def full(*arguments: object) -> None:
        raise sqlite3.OperationalError("it was only a test")

    with monkeypatch.context() as patch:
        patch.setattr(catalogue._journal, "write", full)
        with pytest.raises(errors.StorageError):
            target.namespace.setxattr(ino, b"user.b", b"other")
        with pytest.raises(errors.StorageError):
            target.namespace.removexattr(ino, b"user.a")
    assert catalogue.xattr_bytes(ino, b"user.b") == (7, 5)
    assert catalogue.xattr_bytes(ino, b"user.a") == (0, 0)
