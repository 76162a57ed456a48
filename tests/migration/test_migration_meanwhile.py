"""What happens to other operations while a target is migrated, and how a migration is ended."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.helpers import (
    MEMORY,
    PATIENCE,
    RawPeer,
    eventually,
    file_config,
    pattern,
    raw_connection,
)
from tests.support.migrations import (
    config,
    contents,
    contents_at,
    exists,
    fill,
    handle,
    leftovers,
)
from warabi import errors
from warabi.client import TargetHandle
from warabi.engine import Engine
from warabi.protocol import wire
from warabi.server import Provider

# Operations meanwhile


class Pause:
    """A *progress* that stops a migration at its second step until told to go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.go_on = threading.Event()
        self._calls = 0

    def __call__(self, done: int, total: int) -> None:
        self._calls += 1
        if self._calls == 2:
            self.reached.set()
            assert self.go_on.wait(PATIENCE)


@contextlib.contextmanager
def paused(
    source: Provider, options: dict[str, Any], pause: Pause
) -> Iterator[Callable[[], BaseException | None]]:
    """A migration to provider 2 in a thread, at its pause; gives a function that ends it."""
    outcome: list[BaseException | None] = []

    def migrate() -> None:
        try:
            source.migrate_target(str(source._engine.addr()), 2, options, progress=pause)
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=migrate)
    thread.start()

    def finish() -> BaseException | None:
        pause.go_on.set()
        thread.join(PATIENCE)
        return outcome[0]

    try:
        assert pause.reached.wait(PATIENCE)
        yield finish
    finally:
        finish()


def changes(target: TargetHandle, region: Any, spare: Any) -> list[Callable[[], Any]]:
    call = target._link.call
    return [
        lambda: target.write(region, 0, b"changed"),
        lambda: target.write(region, 0, pattern(100_000, 7)),
        lambda: target.create(10),
        lambda: target.create_and_write(b"new"),
        lambda: target.resize(spare, 5),
        lambda: target.write_vector(region, [(0, 2), (4, 2)], b"abcd"),
        lambda: target.append(spare, pattern(100_000, 8)),
        lambda: target.link_name(spare, "/named"),
        lambda: target.unlink_name("/second"),
        lambda: target.write_async(region, 0, b"async").wait(),
        lambda: call("mkdir", 1, b"made", 0o755, 0, 0, 0),
        lambda: call("setxattr", region.slot, b"user.new", b"1", True),
    ]


@pytest.mark.parametrize("way", ["direct", "wire"])
@pytest.mark.parametrize("success", [True, False], ids=["success", "failure"])
@pytest.mark.parametrize("kind", ["memory", "file"])
def test_reads_go_on_and_changes_wait(
    engine: Engine, client_engine: Engine, tmp_path: Path, way: str, success: bool, kind: str
) -> None:
    manager = {"transfer_manager": {"type": "pipeline", "config": {
        "num_pools": 1, "num_buffers_per_pool": 2, "first_buffer_size": 32768,
        "buffer_size_multiplier": 2}}}  # fmt: skip
    source = Provider(engine, 1, config(kind, tmp_path / "source") | manager)
    destination = Provider(engine, 2, {})
    target = handle(engine if way == "direct" else client_engine, str(engine.addr()), 1)
    regions = fill(target)
    spare = target.create(100)
    expected = contents(target)
    ends: list[Any] = []

    def change(work: Callable[[], Any]) -> None:
        try:
            ends.append(work() and None)
        except errors.Exception as error:
            ends.append(error)

    options = {"new_root": str(tmp_path / "there"), "transfer_size": 4096}
    with paused(source, options, Pause()) as finish:
        works = changes(target, regions[-1], spare)
        threads = [threading.Thread(target=change, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        for _ in range(3):
            assert contents(target) == expected
            time.sleep(0.05)
        assert not ends
        target.persist(regions[3], 0, 10)
        if not success:
            destination.close()  # its end comes when the source commits
        failure = finish()
        for thread in threads:
            thread.join(PATIENCE)
    if success:
        assert failure is None
        assert len(ends) == len(works)
        assert {type(end) for end in ends} == {errors.TargetNotFound}
        assert all("was migrated to provider 2" in str(end) for end in ends)
        assert contents(handle(engine, str(engine.addr()), 2)) == expected
    else:
        assert isinstance(failure, errors.ProviderNotFound)
        assert ends == [None] * len(works)
        assert exists(target, "/named")
        assert not exists(target, "/second")
        files = ["source", "source-wal", "source.regions"] if kind == "file" else []
        eventually(lambda: leftovers(tmp_path) == files)


def test_changes_under_way_are_finished_first(engine: Engine, client_engine: Engine) -> None:
    source, _ = Provider(engine, 1, MEMORY), Provider(engine, 2, {})
    target = handle(client_engine, str(engine.addr()), 1)
    regions = [target.create(1_000_000) for _ in range(4)]
    stop = threading.Event()
    written = [0] * len(regions)

    def write(index: int) -> None:
        with contextlib.suppress(errors.TargetNotFound):
            while not stop.is_set():
                target.write(regions[index], 0, bytes([1 + written[index] % 255]) * 1_000_000)
                written[index] += 1

    threads = [threading.Thread(target=write, args=(i,)) for i in range(len(regions))]
    for thread in threads:
        thread.start()
    eventually(lambda: all(written))
    source.migrate_target(str(engine.addr()), 2)
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
    there = handle(client_engine, str(engine.addr()), 2)
    for region, count in zip(regions, written, strict=True):
        # What was acknowledged is there, whole, or what was written after that, and then refused.
        found = there.read(region, 0, 1_000_000)
        assert found in [bytes([1 + n % 255]) * 1_000_000 for n in (count - 1, count)]


def test_a_client_that_stops_within_a_write_hangs_nothing(engine: Engine) -> None:
    source, _ = Provider(engine, 1, MEMORY), Provider(engine, 2, {})
    address = str(engine.addr())
    target = handle(engine, address, 1)
    region = target.create_and_write(pattern(1000))
    with raw_connection(address) as connection, raw_connection(address) as gone:
        header = [1, 1, "write", [region.to_bytes(), 0, False, False], None]
        RawPeer(connection).send([*header[:4], b"done"])
        stalled = RawPeer(gone)
        stalled.socket.sendall(wire.frame(header, 1000) + b"half" * 100)
        eventually(lambda: target.read(region, 0, 4) == b"done")
        source.migrate_target(address, 2)
    assert handle(engine, address, 2).read(region, 0, 1000) == b"done" + pattern(1000)[4:]


def test_one_migration_at_a_time(engine: Engine, tmp_path: Path) -> None:
    source = Provider(engine, 1, MEMORY)
    other = Provider(engine, 3, MEMORY)
    destination = Provider(engine, 2, {})
    address = str(engine.addr())
    fill(handle(engine, address, 1))
    with paused(source, {"transfer_size": 4096}, Pause()) as finish:
        with pytest.raises(errors.TargetBusy, match="is already being migrated"):
            source.migrate_target(address, 2)
        with pytest.raises(errors.TargetBusy, match="is already receiving a target"):
            other.migrate_target(address, 2)
        assert finish() is None
    assert "target" in destination.get_config()


def test_an_exception_in_the_progress_callback_ends_the_migration(engine: Engine) -> None:
    source, destination = Provider(engine, 1, MEMORY), Provider(engine, 2, {})
    target = handle(engine, str(engine.addr()), 1)
    fill(target)

    def progress(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        source.migrate_target(str(engine.addr()), 2, progress=progress)
    target.create(1)
    source.migrate_target(str(engine.addr()), 2)
    assert "target" in destination.get_config()


@pytest.mark.parametrize("what", ["provider", "engine"])
def test_closing_the_source_ends_the_migration(tmp_path: Path, what: str) -> None:
    path = tmp_path / "source"
    with Engine("na+sm") as there, Engine("na+sm") as engine:
        destination = Provider(there, 2, {})
        source = Provider(engine, 1, file_config(path))
        target = handle(engine, str(engine.addr()), 1)
        fill(target)
        expected = contents(target)
        pause = Pause()
        outcome: list[BaseException] = []

        def migrate() -> None:
            try:
                options = {"new_root": str(tmp_path / "there"), "transfer_size": 4096}
                source.migrate_target(str(there.addr()), 2, options, progress=pause)
            except errors.Exception as error:
                outcome.append(error)

        thread = threading.Thread(target=migrate)
        thread.start()
        assert pause.reached.wait(PATIENCE)
        closing = threading.Thread(target=source.close if what == "provider" else engine.finalize)
        closing.start()
        pause.go_on.set()
        closing.join(PATIENCE)
        thread.join(PATIENCE)
        assert isinstance(outcome[0], errors.ConnectionLost)
        assert "target" not in destination.get_config()
        eventually(lambda: leftovers(tmp_path) == ["source", "source.regions"])
        assert contents_at("file", path) == expected
