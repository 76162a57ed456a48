"""Listings of directories that the kernel keeps: they show what has changed, whoever changed it."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.conftest import disposable, limit_of
from tests.mount.support import Mount, another_python, line_of, mounting, wait_until, watchdog
from tests.mount.together import BELIEVING, Together, emptied, together
from tests.posix.support import opened
from tests.posix.test_readdir import Stream


@pytest.fixture(scope="module")
def believing_module() -> Iterator[Together]:
    with disposable("/tmp") as path, together("na+sm", path, *BELIEVING) as four:
        yield four


@pytest.fixture
def believing(request: pytest.FixtureRequest, believing_module: Together) -> Iterator[Together]:
    """Two mounts whose kernels keep listings for a day."""
    with emptied(believing_module, limit_of(request)) as four:
        yield four


@pytest.fixture
def mount(request: pytest.FixtureRequest, place: Path) -> Iterator[Mount]:
    with mounting("memory:", place) as found, watchdog(found, limit_of(request)):
        yield found


def change(directory: Path, chance: random.Random) -> None:
    """Make, rename or remove one of the names in *directory*."""
    names = sorted(os.listdir(directory))
    kind = chance.choice(("make", "make", "rename", "remove")) if names else "make"
    new = directory / f"{chance.randrange(10**9):09}"
    if kind == "make":
        chance.choice((new.touch, new.mkdir, lambda: new.symlink_to("nowhere")))()
    elif kind == "rename":
        os.rename(directory / chance.choice(names), new)
    else:
        victim = directory / chance.choice(names)
        if victim.is_dir() and not victim.is_symlink():
            victim.rmdir()
        else:
            victim.unlink()


LISTS = """
import os, select, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    for which in (sys.argv[1], fd):
        names = os.listdir(which)
        assert len(set(names)) == len(names)
    with os.scandir(sys.argv[1]) as entries:  # not to the end
        next(entries, None)
"""


def test_a_listing_shows_what_another_mount_changes(believing: Together) -> None:
    """By a new opening, and by one that is rewound, while other programs list the directory."""
    here, there = believing.first.path / "d", believing.second.path / "d"
    there.mkdir()
    for number in range(300):
        (there / f"{number:0100}").touch()
    chance = random.Random(7)
    with (
        another_python(LISTS, here) as one,
        another_python(LISTS, here) as two,
        opened(here, os.O_RDONLY) as fd,
    ):
        assert line_of(one) == line_of(two) == "ready"
        for _ in range(25):
            for _ in range(chance.randrange(1, 9)):
                change(there, chance)
            expected = sorted(os.listdir(there))
            wait_until(lambda e=expected: sorted(os.listdir(fd)) == e, "the rewound listing")  # type: ignore[misc]
            wait_until(lambda e=expected: sorted(os.listdir(here)) == e, "the new listing")  # type: ignore[misc]
        assert one.poll() is two.poll() is None


def test_both_mounts_change_a_directory_that_both_list(believing: Together) -> None:
    paths = believing.first.path / "d", believing.second.path / "d"
    paths[0].mkdir()
    with another_python(LISTS, paths[0]) as one, another_python(LISTS, paths[1]) as two:
        assert line_of(one) == line_of(two) == "ready"
        for number in range(60):
            for path in paths:
                (path / f"{path.parent.parent.name}{number}").touch()
                if number % 3 == 2:
                    os.rename(path / f"{path.parent.parent.name}{number - 1}", path / f"{number}")
                    (path / f"{number}").unlink()
                names = os.listdir(path)  # what the mount itself does shows at once
                assert f"{path.parent.parent.name}{number}" in names
                assert f"{number}" not in names
        expected = {
            f"{path.parent.parent.name}{number}" for path in paths for number in range(60)
            if number % 3 != 1
        }  # fmt: skip
        for path in paths:
            wait_until(lambda p=path: {*os.listdir(p)} == expected, "the other's names")  # type: ignore[misc]
        assert one.poll() is two.poll() is None


def test_streams_show_what_the_mount_itself_changes(mount: Mount) -> None:
    """From whatever place they go on."""
    path = mount.path / "d"
    path.mkdir()
    present = {f"{number:050}" for number in range(1500)}
    for name in present:
        (path / name).touch()
    chance = random.Random(9)
    with (
        contextlib.closing(Stream(path)) as one,
        contextlib.closing(Stream(path)) as two,
    ):
        for _ in range(40):
            stream = chance.choice((one, two))
            stream.rewind()
            places = [(stream.tell(), stream.read())]
            while places[-1][1] is not None:
                places.append((stream.tell(), stream.read()))
            names = [os.fsdecode(name) for _, name in places[:-1] if name is not None]
            assert sorted(names) == sorted({".", "..", *present})
            for name in chance.sample(sorted(present), 3):
                (path / name).unlink()
                present.remove(name)
            made = f"{chance.randrange(10**9)}"
            (path / made).touch()
            present.add(made)
            index = chance.randrange(2, len(places) - 1)
            other = chance.choice((one, two))
            other.seek(places[index][0])
            rest = [os.fsdecode(name) for name in other.rest()]
            # What was there before and is now comes once.  Whether that comes which is made or
            # removed meanwhile is not specified.
            stay = [name for name in names[index:] if name in present]
            assert [name for name in rest if name in stay] == stay
            assert len({*rest}) == len(rest)
            assert {*rest} <= {*names, made}


def test_listings_are_kept_no_longer_than_names_and_attributes(place: Path) -> None:
    """Those are requested one by one then; so the directory is read again, with all of them."""
    with mounting("memory:", place, "attr_timeout=0.2") as mount, watchdog(mount, 60.0):
        path = mount.path / "d"
        path.mkdir()
        for number in range(200):
            (path / f"{number}").touch()
        for _ in range(5):
            assert len(os.listdir(path)) == 200
            time.sleep(0.25)
        with os.scandir(path) as entries:
            assert sum(entry.stat().st_size for entry in entries) == 0
