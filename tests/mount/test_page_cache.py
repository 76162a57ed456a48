"""Which cached pages the kernel keeps of files that other clients may change: see
``warabifs/fs/page_versions.py``."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mount.conftest import disposable, limit_of
from tests.mount.support import (
    PROVIDER_ID,
    Mount,
    mounting,
    serving,
    wait_until,
)
from tests.mount.together import OPTIONS, Together, client_of, emptied, region_of, together
from tests.support.relay import Relay
from warabi import engine as warabi_engine
from warabi.client import Client, TargetHandle
from warabi.region import RegionID

PAGE = mmap.PAGESIZE
EVERYWHERE = pytest.mark.parametrize("four_module", ["na+sm", "tcp"], indirect=True)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


@pytest.fixture(scope="module")
def four_module(request: pytest.FixtureRequest) -> Iterator[Together]:
    """Over TCP, unless the test says ``EVERYWHERE``."""
    transport = getattr(request, "param", "tcp")
    with disposable("/tmp") as path, together(transport, path, *OPTIONS) as four:
        _be_told(four)
        yield four


def _be_told(four: Together) -> None:
    """Return when the first mount is told what others change, which begins with everything."""
    path = four.first.path / "told"
    path.write_bytes(b"old")
    with open(path, "rb", buffering=0) as file:
        assert os.pread(file.fileno(), 3, 0) == b"old"
        four.target.write(region_of(path), 0, b"new")
        wait_until(lambda: os.pread(file.fileno(), 3, 0) == b"new", "what was told")


@pytest.fixture
def four(request: pytest.FixtureRequest, four_module: Together) -> Iterator[Together]:
    with emptied(four_module, limit_of(request)) as four:
        yield four


def kept(path: Path) -> int:
    """How many of a file's pages the kernel has, once it has been opened again."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        here = ctypes.create_string_buffer(-(-len(mapped) // PAGE))
        start = ctypes.c_char.from_buffer(mapped)
        try:
            assert not _libc.mincore(ctypes.addressof(start), len(mapped), here)
        finally:
            del start
        return here.raw.count(b"\1")


def settled(path: Path, pages: int) -> None:
    """Return when the kernel keeps so many pages that were read: what is told late drops some."""
    wait_until(lambda: bool(path.read_bytes()) and kept(path) == pages, "what is kept")


def patch(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b", buffering=0) as file:
        assert os.pwrite(file.fileno(), data, offset) == len(data)


# What is kept


def test_what_was_written_is_kept(four: Together) -> None:
    """A new file, one that is written again, and one that is made longer."""
    path = four.first.path / "file"
    for data in (bytes(16 * PAGE), b"2" * 16 * PAGE):
        path.write_bytes(data)
        assert kept(path) == 16
    patch(path, 3 * PAGE, b"3" * PAGE)
    patch(path, 16 * PAGE, b"4" * PAGE)
    assert kept(path) == 17
    assert path.read_bytes() == b"2" * 3 * PAGE + b"3" * PAGE + b"2" * 12 * PAGE + b"4" * PAGE
    assert four.target.read(region_of(path), 0, 17 * PAGE) == path.read_bytes()


def test_what_was_read_is_kept_also_when_it_is_written_to(four: Together) -> None:
    (four.second.path / "file").write_bytes(bytes(16 * PAGE))
    path, renamed = four.first.path / "file", four.first.path / "other"

    def all_kept() -> bool:
        settled(path, 16)
        patch(path, PAGE, b"x")
        os.stat(path)  # brings another time of change
        written = kept(path)
        path.rename(renamed)
        pages = written, kept(renamed)
        renamed.rename(path)
        return pages == (16, 16)

    # The notification of the second mount's write may arrive at any time, and drops all pages once.
    wait_until(all_kept, "pages that stay when the file is written to and renamed")


def test_with_attr_timeout_0_each_read_sees_changes(place: Path) -> None:
    """With ``attr_timeout=0`` nothing needs to be told: every ``read`` looks."""
    with (
        serving("tcp") as provider,
        mounting(provider.address, place, *OPTIONS, "attr_timeout=0") as mount,
        warabi_engine.Engine("tcp", warabi_engine.client) as engine,
    ):
        path, target = mount.path / "file", client_of(provider, engine)
        path.write_bytes(b"0" * PAGE)
        region = region_of(path)
        with open(path, "rb", buffering=0) as file:
            for number in range(100):
                target.write(region, 0, b"%04d" % number)
                assert os.pread(file.fileno(), 4, 0) == b"%04d" % number


# What is not


CHANGES: dict[str, Callable[[TargetHandle, RegionID, Path], None]] = {
    "a client": lambda target, region, path: target.write(region, PAGE, b"other"),
    "another mount": lambda target, region, path: patch(path, PAGE, b"other"),
}


@EVERYWHERE
@pytest.mark.parametrize("who", CHANGES)
@pytest.mark.parametrize("again", [False, True], ids=["then others", "and once more"])
def test_what_others_wrote_is_seen_when_the_file_is_opened(
    four: Together, who: str, again: bool
) -> None:
    """Also between two writes of our own to a file that stays open, and however soon."""
    path = four.first.path / "file"
    path.write_bytes(b"-" * 4 * PAGE)
    region = region_of(path)
    with open(path, "r+b", buffering=0) as writer:
        _take_turns(four, who, again, writer.fileno(), region)


def _take_turns(four: Together, who: str, again: bool, fd: int, region: RegionID) -> None:
    path, other = four.first.path / "file", four.second.path / "file"
    for number in range(50):
        own = b"%05d" % number
        os.pwrite(fd, own, 0)
        CHANGES[who](four.target, region, other)
        if again:
            os.pwrite(fd, own, 2 * PAGE)
        with open(path, "rb", buffering=0) as file:
            assert os.pread(file.fileno(), 5, PAGE) == b"other"
            assert os.pread(file.fileno(), 5, 0) == own
            assert os.pread(file.fileno(), 5, 2 * PAGE) == (own if again else b"-----")
        os.pwrite(fd, b"-----", PAGE)


def test_times_that_are_set_back_hide_nothing(four: Together) -> None:
    """As ``rsync -t`` and ``tar`` set them."""
    path, other = four.first.path / "file", four.second.path / "file"
    path.write_bytes(b"a" * PAGE)
    before = path.stat()
    for letter in b"bcdefgh":
        settled(path, 1)
        other.write_bytes(bytes([letter]) * PAGE)
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.read_bytes() == bytes([letter]) * PAGE
        assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_a_file_that_others_make_under_the_name_of_one_that_was_read(four: Together) -> None:
    path, other = four.first.path / "file", four.second.path / "file"
    for number in range(20):
        path.write_bytes(b"%04d" % number)
        other.unlink()
        other.write_bytes(b"new!")
        assert path.read_bytes() == b"new!"


def test_a_change_is_seen_by_two_concurrent_opens(four: Together) -> None:
    """The second one must not have what the first one's opening is about to drop."""
    path = four.first.path / "file"
    path.write_bytes(b"0000" * PAGE)
    region, at_once = region_of(path), threading.Barrier(2, timeout=30)

    def look(_: int) -> bytes:
        at_once.wait()
        with open(path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), 4, 0)

    with ThreadPoolExecutor(2) as pool:
        for number in range(300):
            four.target.write(region, 0, b"%04d" % number)
            assert [*pool.map(look, range(2))] == [b"%04d" % number] * 2


@EVERYWHERE
@pytest.mark.parametrize("seed", range(4))
def test_each_open_sees_all_changes(four: Together, seed: int) -> None:
    """Both mounts and a client change a file, in any order; it is compared with a model."""
    chosen = random.Random(seed)
    paths = [four.first.path / "file", four.second.path / "file"]
    model = bytearray(b"-" * 8 * PAGE)
    paths[0].write_bytes(model)
    region = region_of(paths[0])
    for step in range(250):
        path = chosen.choice(paths)
        offset = chosen.randrange(max(1, len(model)))
        data = bytes([33 + step % 90]) * chosen.choice((1, 10, 100, PAGE, 3 * PAGE))
        match chosen.randrange(7):
            case 0 | 1 if model:
                patch(path, offset, data)
                model[offset : offset + len(data)] = data
            case 2 | 3:
                data = data[: len(model) - offset]
                four.target.write(region, offset, data)
                model[offset : offset + len(data)] = data
            case 4:
                os.truncate(path, offset)
                del model[offset:]
            case 5:
                with open(path, "ab", buffering=0) as file:
                    file.write(data)
                model += data
            case _:
                os.utime(path, ns=(step, 1_000_000_000))
        for path in chosen.sample(paths, 2):
            assert path.read_bytes() == model, f"step {step}"


def test_a_lost_connection_invalidates_page_versions(place: Path) -> None:
    """Nobody says what happened meanwhile: an opening right afterwards drops the pages."""
    with serving("tcp") as provider:
        relay = Relay(provider.address)
        try:
            with (
                mounting(relay.address, place, *OPTIONS) as mount,
                warabi_engine.Engine("tcp", warabi_engine.client) as engine,
            ):
                target = Client(engine).make_target_handle(provider.address, PROVIDER_ID)
                for number in range(10):
                    _change_while_cut_off(relay, mount, target, b"%04d" % number)
        finally:
            relay.close()


def _change_while_cut_off(relay: Relay, mount: Mount, target: TargetHandle, data: bytes) -> None:
    path = mount.path / "file"
    path.write_bytes(b"mine" * PAGE)
    region = region_of(path)
    relay.cut()
    target.write(region, 0, data)
    assert path.read_bytes()[:8] == data + b"mine"
