"""Calls that hold a target's lock for long do not block event loops."""

from __future__ import annotations

import threading
import types
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.support.helpers import MEMORY, PATIENCE, eventually, file_config, open_memory, pattern
from warabi import aio, errors
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, client
from warabi.metadata import catalogue, journal
from warabi.region import RegionID
from warabi.server import Provider
from warabi.target import commit, opening, snapshot, state
from warabi.target.config import FileConfig, MemoryConfig
from warabi.target.entries import ArchiveEntry, unpack_all
from warabi.target.handlers import CALLS
from warabi.target.target import Target


@pytest.fixture(params=["memory", "file"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return MEMORY if request.param == "memory" else file_config(tmp_path / "target")


@pytest.fixture
def target(config: dict[str, Any], tmp_path: Path) -> Iterator[Target]:
    """A target of this process alone."""
    with (
        open_memory(MemoryConfig())
        if config is MEMORY
        else opening.open_file(FileConfig(path=str(tmp_path / "target"), create_if_missing=True))
    ) as opened:
        yield opened


@pytest.fixture
def served(config: dict[str, Any]) -> Iterator[tuple[Target, TargetHandle]]:
    """A provider's target, and a handle that reaches it over a socket."""
    with (
        Engine("tcp") as engine,
        Provider(engine, 1, config) as provider,
        Engine("tcp", client, config={"timeout": PATIENCE}) as own,
    ):
        yield provider._core.target, Client(own).make_target_handle(str(engine.addr()), 1)


def _listed(handle: TargetHandle, region: RegionID) -> dict[bytes, ArchiveEntry]:
    data = handle.read(region, 0, handle.size(region))

    class Data:
        offset = 0

        def read(self, size: int) -> bytes:
            piece = data[self.offset : self.offset + size]
            self.offset += len(piece)
            return piece

    return {entry.path: entry for entry in unpack_all(Data())}


def test_a_survey_is_of_one_instant_and_others_go_on_meanwhile(
    served: tuple[Target, TargetHandle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others change everything between its first entry and its second."""
    target, handle = served
    link = handle._link
    directory = link.call("mkdir", 1, b"d", 0o755, 0, 0, 0).ino
    region = handle.create_and_write(pattern(1000))
    link.call("link", region.slot, directory, b"file")
    link.call("setxattr", region.slot, b"user.a", b"before", True)
    link.call("symlink", directory, b"link", b"there", 5, 6)
    link.call("mknod", 1, b"gone", 0o100644, 0, 0, 0, False, 0)
    nameless = handle.create_and_write(b"nameless")
    begun, go_on = threading.Event(), threading.Event()
    entries = snapshot._entries

    def slowly(*arguments: Any) -> Iterator[ArchiveEntry]:
        for number, entry in enumerate(entries(*arguments)):
            if number == 1:
                begun.set()
                assert go_on.wait(PATIENCE)
            yield entry

    monkeypatch.setattr(snapshot, "_entries", slowly)
    with ThreadPoolExecutor(1) as pool:
        surveyed = pool.submit(link.call, "survey")
        try:
            assert begun.wait(PATIENCE)
            link.call("setxattr", region.slot, b"user.a", b"after", True)
            link.call("rename", directory, b"file", 1, b"moved", 0, False)
            link.call("unlink", 1, b"gone", False)
            link.call("unlink", directory, b"link", False)
            link.call("rmdir", 1, b"d", False)
            link.call("mkdir", 1, b"new", 0o755, 0, 0, 0)
            handle.resize(region, 5)
            handle.erase(nameless)
            handle.create_and_write(b"later", persist=True)
            assert not target.occupied
        finally:
            go_on.set()
        found = _listed(handle, surveyed.result(PATIENCE).region)
    assert set(found) == {b"", b"d", b"d/file", b"d/link", b"gone", nameless.hex().encode()}
    assert found[b"d/file"].xattrs == [(b"user.a", b"before")]
    assert (found[b"d/file"].row.size, found[b"d/file"].region) == (1000, region)
    assert (found[b"d/link"].row.target, found[b"d/link"].row.uid) == (b"there", 5)
    copy = link.call("copy", nameless)  # what it tells of can be had
    assert handle.read(copy.region, 0, 8) == b"nameless"


def test_a_survey_that_fails_leaves_nothing(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    region = target.create_and_write(b"x")

    def failing(*arguments: Any) -> Iterator[ArchiveEntry]:
        raise errors.StorageFull("it was only a test")
        yield

    monkeypatch.setattr(snapshot, "_entries", failing)
    with pytest.raises(errors.StorageFull, match="only a test"):
        snapshot.survey(target)
    assert (target.list(), target.erasure._holds) == ([region], set())
    assert not target.occupied


class Deep:
    """What takes more steps than a loop may do, where it may do five."""

    def __init__(self, target: Target) -> None:
        names = target.namespace
        self.region = target.create_and_write(b"x")
        names.link(self.region.slot, 1, b"first")
        ino = 1
        for _ in range(7):
            ino = names.mkdir(ino, b"d", 0o755, 0, 0).ino
            names.link(self.region.slot, ino, b"file")
        self.bottom = ino
        self.other = names.mkdir(1, b"other", 0o755, 0, 0).ino


_LENGTHY: dict[str, Callable[[Deep], tuple[Any, ...]]] = {
    "stat": lambda deep: (deep.region,),
    "list_stats": lambda deep: (RegionID(), 10),
    "resolve": lambda deep: ("/d" * 7,),
    "open_name": lambda deep: ("/d" * 7 + "/file",),
    "link_name": lambda deep: (deep.region, "/d" * 7 + "/more"),
    "unlink_name": lambda deep: ("/d" * 7 + "/file",),
    "rename": lambda deep: (1, b"other", deep.bottom, b"into", 0, False),
    "erase": lambda deep: (deep.region,),
}


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each time that a lock was going to be held for long: whether by the thread of a loop."""
    found: list[bool] = []

    def announce(self: state.TargetState) -> None:
        assert self.occupied
        found.append(threading.get_ident() in state.LOOPS)

    monkeypatch.setattr(state, "STEPS", 5)
    monkeypatch.setattr(state.TargetState, "announce", announce)
    return found


@pytest.mark.parametrize("name", _LENGTHY)
def test_long_operations_run_in_threads(
    served: tuple[Target, TargetHandle], name: str, announced: list[bool]
) -> None:
    target, handle = served
    arguments = _LENGTHY[name](Deep(target))
    assert announced == []
    handle._link.call(name, *arguments)
    assert announced == [False]
    assert not target.occupied


@pytest.mark.parametrize("name", _LENGTHY)
def test_long_operations_of_a_mount_run_in_threads(
    target: Target, name: str, announced: list[bool]
) -> None:
    """Or of another program that holds the target itself and says that it runs a loop."""
    arguments = _LENGTHY[name](Deep(target))

    async def main() -> None:
        await aio.attach(target).call(name, *arguments)

    state.LOOPS.add(threading.get_ident())
    try:
        trio.run(main)
    finally:
        state.LOOPS.discard(threading.get_ident())
    assert announced == [False]


def test_long_operations_give_right_results(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "STEPS", 5)
    deep = Deep(target)
    names = target.namespace
    paths = ["/first"] + ["/d" * depth + "/file" for depth in range(1, 8)]
    assert sorted(target.stat(deep.region).names) == sorted(paths)
    assert CALLS["stat"](target, deep.region).names == target.stat(deep.region).names
    assert len(target.stat(deep.region, 3).names) == 3
    assert len("".join(target.stat(deep.region, -1, 20).names[:-1])) <= 20
    top = names.lookup(1, b"d").ino
    for flags in (0, 2):
        with pytest.raises(errors.PathError, match="into itself"):
            names.rename(1, b"d", deep.bottom, b"file" if flags else b"new", flags)
    names.rename(1, b"other", deep.bottom, b"into")
    assert names.resolve("/d" * 7 + "/into").ino == deep.other
    assert names.lookup(deep.bottom, b"..").ino != top
    target.erase(deep.region)
    with pytest.raises(errors.PathError):
        names.resolve("/d" * 7 + "/file")


async def test_an_attached_target_whose_lock_is_held_keeps_no_loop_waiting(
    target: Target,
) -> None:
    region = target.create_and_write(pattern(5000))
    begun, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with target.state.long, target.state.lock:
            begun.set()
            assert go_on.wait(PATIENCE)

    place = bytearray(5)
    done: list[str] = []
    attached = aio.attach(target)
    calls: dict[str, Callable[[], Any]] = {
        "size": lambda: attached.size(region),
        "write": lambda: attached.write(region, 0, b"12345"),
        "append": lambda: attached.append(region, b"12345"),
        "read": lambda: attached.read_into(region, 0, place),
        "write_vector": lambda: attached.write_vector(region, [(0, 1), (2, 1)], b"12"),
        "read_vector": lambda: attached.read_vector(region, [(0, 1), (2, 1)], bytearray(2)),
        "create": lambda: attached.create_and_write(b"x"),
        "persist": lambda: attached.persist(region, 0, 5),
        "lookup": lambda: attached.call("lookup", 1, region.hex().encode()),
        "mkdir": lambda: attached.call("mkdir", 1, b"d", 0o755, 0, 0, 0),
    }

    async def call(name: str) -> None:
        await calls[name]()
        done.append(name)

    thread = threading.Thread(target=hold)
    thread.start()
    assert begun.wait(PATIENCE)
    try:
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                for name in calls:
                    nursery.start_soon(call, name)
                for _ in range(5):  # the loop goes on
                    await trio.sleep(0.01)
                assert done == []
                go_on.set()
    finally:
        go_on.set()
        thread.join(PATIENCE)
    assert set(done) == set(calls)


def _pages_by_sqlite(target: Target) -> int:
    _, pages, _ = target._catalogue._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    return int(pages)


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Target]:
    config = FileConfig(path=str(tmp_path / "target"), create_if_missing=True)
    with opening.open_file(config) as opened:
        yield opened


def _change(target: Target, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        target.namespace.mkdir(1, b"%d" % number, 0o755, 0, 0)
        target.commit()


def test_the_wal_s_length_is_known(stored: Target) -> None:
    """Also when it was begun anew, and what was there before is longer."""
    first = 0
    for count in (1, 100, 1, 30, 0, 200):
        if count:
            _change(stored, count, first)
            first += count
            counted = stored._catalogue._journal._pages()
            with stored.state.lock:
                assert counted == _pages_by_sqlite(stored) >= count


def test_checkpoints_are_made_while_loops_leave_the_target_alone(
    stored: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_CHECKPOINT", 300)
    seen: list[tuple[bool, int]] = []
    checkpoint = journal.Journal.checkpoint

    def watched(self: journal.Journal) -> None:
        seen.append((stored.occupied, self._pages()))
        checkpoint(self)

    monkeypatch.setattr(journal.Journal, "checkpoint", watched)
    stored._catalogue._journal._look_after = 0
    _change(stored, 500)
    assert len(seen) >= 3
    for occupied, pages in seen[1:]:
        assert occupied
        assert 300 <= pages < 700
    assert stored._catalogue._journal._pages() < 700


def test_a_checkpoint_that_fails_fails_no_persist(
    stored: Target, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(self: journal.Journal) -> None:
        raise errors.StorageFull("it was only a test")

    monkeypatch.setattr(journal, "_CHECKPOINT", 20)
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "checkpoint", failing)
        stored._catalogue._journal._look_after = 0
        _change(stored, 30)
    assert "checkpoint of" in caplog.text
    assert not stored.occupied
    region = stored.create_and_write(b"x", persist=True)
    assert stored.read(region, 0, 1) == b"x"
    eventually(lambda: stored._catalogue._journal._look_after > 0)


def test_large_commits_are_announced(stored: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    commit = journal.Journal.commit

    def watched(self: journal.Journal, change: int) -> int:
        seen.append(stored.occupied)
        return commit(self, change)

    monkeypatch.setattr(journal, "_MANY", 5)
    monkeypatch.setattr(journal.Journal, "commit", watched)
    for number in range(20):
        stored.namespace.mkdir(1, b"%d" % number, 0o755, 0, 0)
        stored.namespace.setxattr(1, b"user.%d" % number, b"x")
    stored.commit()
    assert True in seen


def test_a_commit_of_many_changes_writes_them_in_steps(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other calls are served between them; entries that cannot be stored do not add steps."""
    region = target.create_and_write(b"x")
    for number in range(50):
        target.namespace.link(region.slot, 1, b"%d" % number)
    target.commit()
    target.erase(region)
    sizes: list[int] = []

    def pause(seconds: float) -> None:
        target.namespace.mkdir(1, b"during %d" % len(sizes), 0o755, 0, 0)
        sizes.append(len(target._catalogue._dentries.dirty))

    monkeypatch.setattr(catalogue, "_FLUSH_AT", 20)
    monkeypatch.setattr(catalogue, "_FLUSH", 10)
    monkeypatch.setattr(commit, "time", types.SimpleNamespace(sleep=pause))
    target.commit()
    monkeypatch.undo()
    assert len(sizes) == 5
    assert sizes[0] > 3 * sizes[-1]
    assert [name for name, _ in target.namespace.readdir(1)] == [b"during %d" % i for i in range(5)]


def test_data_kept_by_an_export_are_erased_in_a_thread(
    served: tuple[Target, TargetHandle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regions by the thousand that were erased meanwhile, when it ends."""
    target, handle = served
    erasing: list[bool] = []
    erase = type(target._storage).erase

    def watched(self: Any, rid: RegionID) -> None:
        erasing.append(threading.get_ident() in state.LOOPS)
        erase(self, rid)

    listing = handle._link.call("survey")
    for _ in range(1000):
        target.erase(target.create_and_write(b"x"))
    kept = handle.create_and_write(b"kept")
    handle.erase(kept)
    assert target.erasure.pending > 1000
    monkeypatch.setattr(type(target._storage), "erase", watched)
    handle._link.call("unpin", listing.ino, 1)
    with pytest.raises(errors.InvalidRegion):
        handle._link.call("copy", kept)
    target.commit()
    eventually(lambda: not target.erasure.pending and not target.erasure._thread)
    assert True not in erasing
    assert target.list() == []
    assert handle.read(handle.create_and_write(b"new"), 0, 3) == b"new"


async def test_a_programs_own_loop_does_not_wait_for_a_region(target: Target) -> None:
    """Another thread is inside it alone, until a task of that loop lets it go."""
    api = aio.attach(target)
    region = target.create_and_write(b"-" * 100)
    buffer = bytearray(10)
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: api.write(region, 0, b"x"),
        lambda: api.append(region, b"x"),
        lambda: api.read_into(region, 0, buffer),
        lambda: api.resize(region, 50),
        lambda: api.persist(region, 0, 10),
        lambda: api.write_vector(region, [(0, 1)], b"x"),
        lambda: api.read_vector(region, [(0, 1)], bytearray(1)),
    ]
    for call in calls:
        entered, leave = threading.Event(), threading.Event()

        def hold(entered: threading.Event = entered, leave: threading.Event = leave) -> bool:
            inode = target.locks.enter_exclusive(region, "hold", True)
            entered.set()
            let_go = leave.wait(5)
            target.locks.leave_exclusive(inode)
            return let_go

        with ThreadPoolExecutor(1) as pool:
            holding = pool.submit(hold)
            assert entered.wait(PATIENCE)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call)
                await trio.testing.wait_all_tasks_blocked()
                leave.set()
            assert holding.result(PATIENCE), "the loop waited for the region"
    assert threading.get_ident() not in state.LOOPS
    target.write(region, 0, b"a blocking call of the same thread may wait")


async def test_a_programs_own_loop_commits_few_changes(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, steps = catalogue.Catalogue.flush_some, list[int]()

    def flush_some(self: catalogue.Catalogue, left: int = 0) -> None:
        if left == 0:  # a step of a commit, between two of which it pauses
            steps.append(threading.get_ident())
        original(self, left)

    monkeypatch.setattr(catalogue.Catalogue, "flush_some", flush_some)
    api = aio.attach(target)
    regions = [target.create(1) for _ in range(5000)]
    for name in ("sync", "commit"):
        for region in regions:
            target.write(region, 0, b"x")
        steps.clear()
        await api.call(name)
        assert steps
        assert threading.get_ident() not in steps
