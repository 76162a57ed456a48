"""No operation blocks a provider's event loop, whatever its size."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.protocol.test_hostile_requests import valid_arguments
from tests.support.helpers import (
    MEMORY,
    PATIENCE,
    RawPeer,
    eventually,
    file_config,
    pattern,
    raw_connection,
)
from tests.support.loops import Hold, check_never_held, check_not_held, watched_loops
from warabi import errors
from warabi._core import extents
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, client
from warabi.in_process.link import Link
from warabi.metadata.catalogue import Catalogue
from warabi.metadata.domain import Row
from warabi.protocol.operations import OPERATIONS, Payload, Served
from warabi.region import RegionID
from warabi.server import Provider
from warabi.target.entries import ArchiveEntry
from warabi.target.handlers import CALLS
from warabi.target.state import LOOPS
from warabi.target.target import Target

MIB = 1 << 20
_MANY = 20_000


class Place:
    """A provider whose loop is watched, and a way to it over a socket."""

    def __init__(self, address: str, handle: TargetHandle, held: list[Hold]) -> None:
        self.address = address
        self.handle = handle
        self.link: Link = handle._link
        self.held = held

    def calls(self, name: str, *arguments: Any) -> Any:
        """The result of an operation, which does not hold the loop."""
        results: list[Any] = []
        check_not_held(self.held, lambda: results.append(self.link.call(name, *arguments)))
        return results[-1]


@contextmanager
def serving(config: dict[str, Any]) -> Iterator[Place]:
    with (
        watched_loops() as held,
        Engine("tcp") as engine,
        Provider(engine, 1, config),
        Engine("tcp", client) as own,
    ):
        handle = Client(own).make_target_handle(str(engine.addr()), 1)
        yield Place(str(engine.addr()), handle, held)


@pytest.fixture(params=["memory", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    config = MEMORY if request.param == "memory" else file_config(tmp_path / "target")
    with serving(config) as found:
        yield found


def _filled(place: Place, size: int) -> RegionID:
    region = place.handle.create(size)
    data = pattern(4 * MIB)
    for offset in range(0, size, len(data)):
        place.handle.write(region, offset, data)
    return region


def test_copies_and_the_end_of_large_regions(place: Place) -> None:
    region = _filled(place, 256 * MIB)
    copy = place.calls("copy", region)
    assert place.handle.read(copy.region, 252 * MIB, 4 * MIB) == pattern(4 * MIB)
    place.held.clear()
    place.handle.resize(region, 100)
    assert place.handle.read(region, 0, 100) == pattern(4 * MIB)[:100]
    place.handle.erase(copy.region)
    place.handle.create_and_write(b"x")  # frees what was erased, if nothing else has
    check_never_held(place.held)


def test_holes_of_any_size(place: Place) -> None:
    size = place.handle._link.call("room")[0] // 2
    region = place.calls("create", size)
    place.calls("resize", region, size + 5)
    copy = place.calls("copy", region)
    assert copy.size == size + 5
    place.calls("resize", region, 0)
    with pytest.raises(errors.BadArchive):
        place.calls("graft", copy.region)


def test_no_loop_commits_many_changes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a memory target, too, whose few changes are committed in the loop."""
    original = Catalogue.flush_some
    steps: list[bool] = []

    def flush_some(catalogue: Catalogue, left: int = 0) -> None:
        if left == 0:  # a step of a commit, between two of which it pauses
            steps.append(threading.get_ident() in LOOPS)
        original(catalogue, left)

    monkeypatch.setattr(Catalogue, "flush_some", flush_some)
    regions = [place.handle.create(10) for _ in range(5000)]
    for name in ("sync", "commit"):
        for region in regions:
            place.handle.write(region, 0, b"x")
        steps.clear()
        place.calls(name)
        assert steps
        assert not any(steps)


def test_a_copy_of_what_is_unknown_during_a_survey(place: Place) -> None:
    place.calls("survey")
    for region in (RegionID(), RegionID.from_parts(1 << 40, 5)):
        before = time.thread_time()
        with pytest.raises(errors.InvalidRegion):
            place.calls("copy", region)
        assert time.thread_time() - before < 1


def test_many_extents(place: Place) -> None:
    region = place.handle.create(MIB)
    packed = extents.pack([(number, 1) for number in range(extents.EXTENTS)])
    place.calls("persist_vector", region, packed)
    data = pattern(extents.EXTENTS)
    pairs = [(number * 3, 1) for number in range(extents.EXTENTS)]
    check_not_held(place.held, lambda: place.handle.write_vector(region, pairs, data))
    found = bytearray(len(data))
    check_not_held(place.held, lambda: place.handle.read_vector(region, pairs, found))
    assert found == data
    with pytest.raises(errors.ProtocolError, match=f"the limit is {extents.EXTENTS}"):
        place.calls("persist_vector", region, packed + bytes(16))


def _entries(count: int) -> bytes:
    """A listing with so many symbolic links in the root directory."""
    root = Row(1, 1, 0o40755, 2, 0, 0, 0, 0, 1, 1, 1, 0, None)
    listing = [ArchiveEntry(b"", root, []).pack()]
    for number in range(count):
        row = Row(number + 2, 1, 0o120777, 1, 0, 0, 0, 6, 1, 1, 1, 0, b"target")
        listing.append(ArchiveEntry(b"link %d" % number, row, []).pack())
    return b"".join(listing)


def test_many_names(place: Place) -> None:
    """Grafted, listed, surveyed, looked up; others are served as soon as it has ended."""
    handle, link = place.handle, place.link
    listing = handle.create_and_write(_entries(_MANY))
    other = handle.create_and_write(b"other")
    stop = threading.Event()
    served: list[bytes] = []

    def work() -> None:
        with Engine("tcp", client) as engine:
            own = Client(engine).make_target_handle(place.address, 1)
            while not stop.is_set():
                own.write(other, 0, b"other")
                served.append(own.read(other, 0, 5))
                own._link.call("getattr", 1)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        place.held.clear()
        assert link.call("graft", listing) == _MANY
        found = place.calls("survey")
        assert found.size > len(_entries(_MANY)) // 2
        assert len(place.calls("readdir", 1, b"", 1000)) == 1000
        assert len(place.calls("list", RegionID(), 1000)) >= 3
        count = len(served)
        eventually(lambda: len(served) > count + 1)
    finally:
        stop.set()
        thread.join(PATIENCE)
    check_never_held(place.held)
    assert set(served) == {b"other"}


def test_pins_of_a_connection_that_ends(place: Place) -> None:
    inodes = [
        place.link.call("mknod", 1, b"%d" % number, 0o100644, 0, 0, 0, False, 0).ino
        for number in range(2000)
    ]
    with Engine("tcp", client) as engine:
        own = Client(engine).make_target_handle(place.address, 1)._link
        for ino in inodes:
            own.call("pin", ino)
            own.call("pin", ino)
        place.held.clear()
    for number in range(2000):
        place.link.call("unlink", 1, b"%d" % number, False)
    eventually(lambda: place.handle.list().__next__ is not None)
    check_never_held(place.held)


def test_a_region_of_many_names(place: Place) -> None:
    region = place.handle.create_and_write(b"x")
    first = place.link.call("link", region.slot, 1, b"first")
    for number in range(5000):
        place.link.call("link", first.ino, 1, b"name %d" % number)
    assert len(place.calls("stat", region).names) == 1000
    place.held.clear()
    place.handle.erase(region)
    check_never_held(place.held)


@pytest.mark.parametrize("held_by", ["graft", "survey"])
def test_calls_wait_outside_the_loop_while_the_lock_is_held(
    place: Place, held_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one operation has the target's lock: the loop answers what needs no target."""
    begun, go_on = threading.Event(), threading.Event()

    def occupying(target: Target, *arguments: Any) -> int:
        with target.state.long, target.state.guard.lock:
            begun.set()
            assert go_on.wait(PATIENCE)
        raise errors.BadArchive("it was only a test")

    monkeypatch.setitem(CALLS, held_by, occupying)
    region = place.handle.create_and_write(bytes(100))
    names = [
        name for name, one in OPERATIONS.items() if one.served in (Served.TARGET, Served.TRANSFER)
    ]
    names.remove(held_by)
    payload = pattern(100_000)
    with raw_connection(place.address) as first, raw_connection(place.address) as second:
        holder, peer = RawPeer(first), RawPeer(second)
        try:
            valid = [region] * len(OPERATIONS[held_by].arguments)
            holder.send([1, 1, held_by, valid, None])
            assert begun.wait(PATIENCE)
            for number, name in enumerate(names):
                operation = OPERATIONS[name]
                arguments = valid_arguments(operation, region)
                upload = operation.payload is Payload.UPLOAD
                peer.send([number, 1, name, arguments, b"eager" if upload else None])
                if upload:
                    peer.send([1000 + number, 1, name, arguments, None], payload)
                assert peer.call([5000, 1, "ping", [], None]) == [5000, None]
                assert holder.call([5000, 1, "ping", [], None]) == [5000, None]
        finally:
            go_on.set()
        assert holder.reply()[3][0] == "archive"
        expected = {*range(len(names))} | {
            1000 + number
            for number, name in enumerate(names)
            if OPERATIONS[name].payload is Payload.UPLOAD
        }
        assert {peer.reply()[0] for _ in expected} == expected


def test_a_region_that_an_export_keeps_is_not_made_anew(place: Place) -> None:
    region = place.handle.create_and_write(b"kept")
    listing = place.link.call("survey")
    place.handle.erase(region)
    with pytest.raises(errors.TargetBusy, match="in use by an export"):
        place.link.call("adopt", region, 4)
    copy = place.link.call("copy", region)
    assert place.handle.read(copy.region, 0, 4) == b"kept"
    place.link.call("unpin", listing.ino, 1)
    assert place.link.call("adopt", region, 4).region == region
    assert place.handle.read(region, 0, 4) == bytes(4)
