"""readdir(3), telldir(3), seekdir(3) and rewinddir(3), of directories that change."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.support import Mount, fails_with, mounting, run
from tests.posix.support import (
    KINDS,
    check,
    file,
    libc,
    make,
    opened,
)
from warabi._core.attributes import ROOT
from warabi.target import opening
from warabi.target.config import FileConfig


def test_a_listing_has_the_dots_with_their_inodes(where: Path) -> None:
    directory = where / "directory"
    directory.mkdir()
    file(directory / "file")
    lines = run("ls", "-1aif", directory).stdout.splitlines()
    inodes = {name: int(ino) for ino, name in (line.split() for line in lines)}
    assert inodes == {
        ".": directory.stat().st_ino,
        "..": where.stat().st_ino,
        "file": (directory / "file").stat().st_ino,
    }


def test_a_listing_while_the_directory_changes_shows_the_rest_exactly_once(where: Path) -> None:
    stable = {f"stable{n:04}" for n in range(700)}
    fleeting = [f"fleeting{n:04}" for n in range(200)]
    for name in (*stable, *fleeting):
        file(where / name)
    seen: list[str] = []
    with os.scandir(where) as entries:
        for number, entry in enumerate(entries):
            seen.append(entry.name)
            if number % 4 == 0 and fleeting:
                (where / fleeting.pop()).unlink()
                file(where / f"added{number:04}")
    assert sorted(name for name in seen if name.startswith("stable")) == sorted(stable)
    assert len(set(seen)) == len(seen)


def test_removing_entries_while_listing_them_removes_all(where: Path) -> None:
    for number in range(700):
        file(where / f"file{number}")
    with os.scandir(where) as entries:
        for entry in entries:
            os.unlink(entry)
    assert os.listdir(where) == []


def test_an_open_directory_can_be_listed_again(where: Path) -> None:
    file(where / "one")
    with opened(where, os.O_RDONLY | os.O_DIRECTORY) as fd:
        assert os.listdir(fd) == ["one"]
        file(where / "two")
        (where / "one").unlink()
        assert os.listdir(fd) == ["two"]


class Stream:
    """A directory stream, as C programs have it."""

    def __init__(self, path: Path) -> None:
        for name, result in (("opendir", ctypes.c_void_p), ("readdir", ctypes.c_void_p),
                             ("telldir", ctypes.c_long)):  # fmt: skip
            getattr(libc, name).restype = result
        self._stream = ctypes.c_void_p(libc.opendir(os.fsencode(path)))
        assert self._stream

    def read(self) -> bytes | None:
        """The next name; None at the end."""
        entry = libc.readdir(self._stream)
        # struct dirent: inode, offset (8 bytes each), length (2), type (1), name
        return None if entry is None else ctypes.string_at(entry + 19)

    def rest(self) -> list[bytes]:
        return list(iter(self.read, None))

    def tell(self) -> int:
        return int(libc.telldir(self._stream))

    def seek(self, place: int) -> None:
        libc.seekdir(self._stream, ctypes.c_long(place))

    def rewind(self) -> None:
        libc.rewinddir(self._stream)

    def close(self) -> None:
        check(libc.closedir(self._stream))


@pytest.fixture
def full(where: Path) -> Path:
    for number in range(600):
        os.mknod(
            where / f"{number:03}", 0o600 | stat.S_IFREG if number % 2 else 0o600 | stat.S_IFIFO
        )
    return where


def test_a_place_in_a_listing_can_be_returned_to(full: Path) -> None:
    with contextlib.closing(Stream(full)) as stream:
        places: list[int] = []
        names: list[bytes | None] = []
        while True:
            places.append(stream.tell())
            names.append(stream.read())
            if names[-1] is None:
                break
        assert len(names) == 603
        for index in (602, 0, 1, 2, 300, 17, 599, 300, 601, 128, 130, 2):
            stream.seek(places[index])
            assert stream.tell() == places[index]
            assert stream.read() == names[index]
        stream.seek(places[5])
        assert stream.rest() == names[5:-1]
        stream.seek(places[400])  # of the first pass, after a second one
        assert stream.rest() == names[400:-1]


def test_a_place_is_kept_while_the_directory_changes(full: Path) -> None:
    with contextlib.closing(Stream(full)) as stream:
        while stream.read() != b"300":
            pass
        place = stream.tell()
        expected = stream.read()
        after = stream.rest()
        for number in range(600):
            name = b"%03d" % number
            if name != expected and name not in after[::3]:
                (full / name.decode()).unlink()
        stream.seek(place)
        found = stream.rest()
        assert found[0] == expected
        # Whether those that were removed since the start come is not specified.
        assert {*after[::3]} <= {*found[1:]} <= {*after}
        assert len({*found}) == len(found)
        stream.rewind()
        assert {*stream.rest()} == {b".", b"..", expected, *after[::3]}


def test_a_rewound_listing_shows_what_is_there_now(full: Path) -> None:
    with contextlib.closing(Stream(full)) as stream:
        first = stream.rest()
        for name in list(full.iterdir())[::2]:
            name.unlink()
        file(full / "new")
        stream.rewind()
        second = stream.rest()
    assert len(first) == 602
    assert sorted(second) == sorted([b".", b"..", *map(os.fsencode, os.listdir(full))])
    assert len(second) == 303


def test_two_streams_of_a_directory_do_not_meet(full: Path) -> None:
    with contextlib.closing(Stream(full)) as one, contextlib.closing(Stream(full)) as two:
        alternating = [(one.read(), two.read()) for _ in range(602)]
        assert all(first == second for first, second in alternating)
        assert one.read() is two.read() is None
        one.rewind()
        assert two.read() is None
        assert len(one.rest()) == 602


@pytest.mark.parametrize("listed", [True, False], ids=["known", "new"])
def test_a_place_is_valid_in_another_opening(full: Path, listed: bool) -> None:
    """As an NFS server uses it, which opens the directory for each part of a listing."""
    with contextlib.closing(Stream(full)) as stream:
        names: list[bytes | None] = []
        places: list[int] = []
        while not names or names[-1] is not None:
            places.append(stream.tell())
            names.append(stream.read())
    if not listed:  # all that a file system knows of the directory may be forgotten meanwhile
        Path("/proc/sys/vm/drop_caches").write_text("2")
    for index in (599, 3, 300, 301, 602):
        with contextlib.closing(Stream(full)) as stream:
            stream.seek(places[index])
            assert stream.read() == names[index]
            assert stream.rest() == names[index + 1 : -1]


def test_streams_agree_on_places_while_the_directory_changes(full: Path) -> None:
    with contextlib.closing(Stream(full)) as one, contextlib.closing(Stream(full)) as two:
        while one.read() != b"200":
            pass
        place, expected = one.tell(), one.read()
        for number in range(150):
            (full / f"{number:03}").unlink()
            file(full / f"new{number}")
        stay = {b"%03d" % number for number in range(150, 600)}
        after = one.rest()
        two.seek(place)
        assert two.read() == expected
        assert sorted(stay.intersection(two.rest())) == sorted(stay.intersection(after))
        one.rewind()
        assert len(set(one.rest())) == 602


def test_seeking_to_invalid_positions_of_a_directory(full: Path) -> None:
    with opened(full, os.O_RDONLY) as fd:
        assert len(os.listdir(fd)) == 600
        with fails_with(errno.EINVAL):
            os.lseek(fd, -1, os.SEEK_SET)
        os.lseek(fd, 1 << 40, os.SEEK_SET)
        buffer = ctypes.create_string_buffer(4096)
        check(libc.getdents64(fd, buffer, 4096))  # what it finds there is the file system's
        os.lseek(fd, 0, os.SEEK_SET)
        assert len(os.listdir(fd)) == 600
        with fails_with(errno.EISDIR):
            os.read(fd, 10)


def test_readdir_reports_the_type_of_every_kind(where: Path) -> None:
    for kind in KINDS:
        make(kind, where / kind)
    with os.scandir(where) as entries:
        found = {
            entry.name: stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode) for entry in entries
        }
    assert found == {kind: stat.S_IFMT((where / kind).lstat().st_mode) for kind in KINDS}
    lines = run("find", where, "-mindepth", "1", "-printf", "%f %y %i\n").stdout.splitlines()
    assert {tuple(line.split()) for line in lines} == {
        (kind, letter, str((where / kind).lstat().st_ino))
        for kind, letter in zip(KINDS, "fdlpscb", strict=True)
    }


MANY = 100_000


@pytest.fixture
def crowded(place: Path) -> Iterator[Mount]:
    """A mount with a directory of ``MANY`` entries."""
    config = FileConfig(path=str(place / "target"), create_if_missing=True)
    with opening.open_file(config) as target:
        parent = target.namespace.mkdir(ROOT, b"d", 0o755, 0, 0).ino
        for number in range(MANY):
            target.namespace.mknod(parent, b"%06d" % number, stat.S_IFIFO | 0o644, 0, 0)
    with mounting(f"file:{place}/target", place) as mount:
        yield mount


def test_a_directory_of_100000_entries_is_listed_whole_while_it_changes(crowded: Mount) -> None:
    path = crowded.path / "d"
    seen: list[str] = []
    with os.scandir(path) as entries:
        for number, entry in enumerate(entries):
            seen.append(entry.name)
            if number % 500 == 0:
                (path / f"{(number * 7 + 13) % MANY // 10 * 10 + 5:06}").unlink(missing_ok=True)
                os.mkfifo(path / f"{number:06}.new")
                os.rename(path / f"{MANY - 10 - number // 10 * 10:06}", path / f"{number:06}.moved")
    assert len(set(seen)) == len(seen)
    stay = {f"{n:06}" for n in range(MANY) if n % 10 not in (0, 5)}
    assert stay <= set(seen)
    assert len(os.listdir(path)) == len(list(path.glob("*")))
    with contextlib.closing(Stream(path)) as stream:
        names = [stream.read() for _ in range(60_000)]
        place = stream.tell()
        after = [stream.read() for _ in range(10)]
        stream.seek(place)
        assert [stream.read() for _ in range(10)] == after
    assert not {*after} & {*names}
