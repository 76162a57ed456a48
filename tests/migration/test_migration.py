"""Migrations: all backends, all that a target holds, and everything that can go wrong."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.helpers import (
    MEMORY,
    Served,
    pattern,
    pmem_config,
    provider_process,
)
from tests.support.migrations import (
    BACKENDS,
    config,
    contents,
    contents_at,
    exists,
    fill,
    handle,
    leftovers,
    merge,
)
from warabi import errors
from warabi.client import TargetHandle
from warabi.engine import Engine
from warabi.metadata.catalogue import Catalogue
from warabi.provider.migration.records import TABLES
from warabi.server import Provider
from warabi.tools.migrate import ask

PAIRS = list(itertools.product(BACKENDS, BACKENDS))


# Between two processes


@pytest.fixture(scope="module", params=["na+sm", "ofi+tcp"])
def processes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Served, Served, Path]]:
    """A source and a destination for each pair of backends, and where their files are."""
    path = tmp_path_factory.mktemp("migration")
    remote = {"migration": {"send": True, "receive": True, "root": str(path / "there")}}
    sources = [config(kind, path / "here" / str(i)) for i, (kind, _) in enumerate(PAIRS)]
    with (
        provider_process(request.param, *(source | remote for source in sources)) as source,
        provider_process(request.param, *(remote for _ in PAIRS)) as destination,
    ):
        yield source, destination, path


@pytest.mark.parametrize("pair", range(len(PAIRS)), ids=["-".join(pair) for pair in PAIRS])
def test_a_migrated_target_has_the_same_contents(
    processes: tuple[Served, Served, Path], pair: int, client_engine: Engine
) -> None:
    source, destination, path = processes
    kind = PAIRS[pair][1]
    before = handle(client_engine, source.address, pair + 1)
    after = handle(client_engine, destination.address, pair + 1)
    regions = fill(before)
    expected = contents(before)
    with pytest.raises(errors.TargetNotFound, match=f"provider {pair + 1} has no target"):
        after.create(1)
    seen: list[tuple[int, int]] = []

    options = {"merge_config": merge(kind), "new_root": f"moved/{pair}", "transfer_size": 30_000}
    ask(
        client_engine, (source.address, pair + 1), (destination.address, pair + 1), options,
        lambda done, total: seen.append((done, total)),
    )  # fmt: skip

    assert contents(after) == expected
    went = f"migrated to provider {pair + 1} at {re.escape(destination.address)}"
    with pytest.raises(errors.TargetNotFound, match=went):
        before.read(regions[0], 0, 0)
    with pytest.raises(errors.TargetNotFound, match=went):
        before.create(1)
    assert not [name for name in leftovers(path / "here") if name.startswith(f"{pair}")]
    assert (f"{pair}" in leftovers(path / "there" / "moved")) == (kind != "memory")
    assert all(0 <= done <= total for done, total in seen)
    # It is a target like any other.
    fresh = after.create_and_write(b"new", persist=True)
    assert fresh not in expected
    after.erase(regions[-1])
    assert not exists(after, "/second")
    after.write(regions[1], 0, b"!", persist=True)
    assert after.read(regions[1], 0, 1) == b"!"


@pytest.mark.parametrize("kind", ["file", "pmem"])
def test_a_migrated_target_is_durable_at_once(
    kind: str, tmp_path: Path, client_engine: Engine
) -> None:
    with (
        provider_process("na+sm", MEMORY) as source,
        provider_process("na+sm", {}) as destination,
    ):
        before = handle(client_engine, source.address, 1)
        fill(before)
        expected = contents(before)
        path = tmp_path / "target"
        options = {"merge_config": merge(kind), "new_root": str(path)}
        ask(client_engine, (source.address, 1), (destination.address, 1), options)
        destination.kill()
    assert contents_at(kind, path) == expected


# Within one process


def test_configurations_follow(
    engine: Engine, moving: tuple[Provider, Provider, TargetHandle], tmp_path: Path
) -> None:
    source, destination, target = moving
    expected = contents(target)
    address = str(engine.addr())
    calls: list[tuple[int, int]] = []
    source.migrate_target(
        address=address, provider_id=2, options={"new_root": str(tmp_path / "there")},
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert calls[0][0] == 0
    assert calls[-1] == (calls[-1][1],) * 2
    assert calls == sorted(calls)
    assert "target" not in source.get_config()
    assert source
    found = destination.get_config()["target"]
    assert found["type"] == "file"
    assert (
        found["config"] | {"path": str(tmp_path / "there"), "create_if_missing": True}
        == (found["config"])
    )
    # And back, to where there is none any more; the options as JSON, another backend.
    destination.migrate_target(
        address, 1, '{"merge_config": {"type": "memory", "config": {"capacity": 9000000}}}'
    )
    assert source.get_config()["target"] == {"type": "memory", "config": {"capacity": 9000000}}
    assert "target" not in destination.get_config()
    assert contents(target) == expected
    with pytest.raises(errors.StorageFull):
        target.create(9000000)
    # What a closed provider served can be served again, by this configuration.
    pool = {"type": "pmem", "config": {"create_if_missing_with_size": 1 << 24}}
    options = {"new_root": f"{tmp_path}/again", "merge_config": {"target": pool}}
    source.migrate_target(address, 2, options)
    settings = destination.get_config()
    destination.close()
    with Provider(engine, 3, settings):
        again = handle(engine, address, 3)
        assert contents(again) == expected
        with pytest.raises(errors.StorageFull):
            again.create(1 << 24)


def test_a_pmem_target_keeps_its_quota(engine: Engine, tmp_path: Path) -> None:
    made = pmem_config(tmp_path / "source", create_if_missing_with_size=1 << 24)
    Provider(engine, 1, made).close()
    source = Provider(engine, 1, pmem_config(tmp_path / "source"))  # larger, without effect
    destination = Provider(engine, 2, {})
    source.migrate_target(str(engine.addr()), 2, {"new_root": str(tmp_path / "there")})
    config = destination.get_config()["target"]["config"]
    assert config["create_if_missing_with_size"] == 1 << 24
    with pytest.raises(errors.StorageFull):
        handle(engine, str(engine.addr()), 2).create((1 << 24) + 1)


@pytest.mark.parametrize("ending", ["", "/"])
def test_a_directory_as_new_root(
    engine: Engine,
    moving: tuple[Provider, Provider, TargetHandle],
    tmp_path: Path,
    ending: str,
) -> None:
    source, destination, _ = moving
    directory = tmp_path / "directory"
    if not ending:
        directory.mkdir()
    source.migrate_target(str(engine.addr()), 2, {"new_root": f"{directory}{ending}"})
    path = destination.get_config()["target"]["config"]["path"]
    assert path == str(directory / "source")
    assert os.path.isfile(path)


def test_a_source_that_is_kept(
    engine: Engine, moving: tuple[Provider, Provider, TargetHandle], tmp_path: Path
) -> None:
    source, _, target = moving
    expected = contents(target)
    options = {"new_root": str(tmp_path / "there"), "remove_source": False}
    source.migrate_target(str(engine.addr()), 2, options)
    with pytest.raises(errors.TargetNotFound, match="was migrated to provider 2"):
        target.create(1)
    there = handle(engine, str(engine.addr()), 2)
    there.create(1)
    assert contents_at("file", tmp_path / "here" / "source") == expected
    assert contents(there) != expected


def test_many_regions_share_messages(engine: Engine) -> None:
    source, _ = Provider(engine, 1, MEMORY), Provider(engine, 2, {})
    target = handle(engine, str(engine.addr()), 1)
    regions = [target.create_and_write(b"%09d" % i) for i in range(20_000)]
    steps: list[int] = []
    source.migrate_target(str(engine.addr()), 2, progress=lambda done, total: steps.append(done))
    assert len(steps) < 5
    there = handle(engine, str(engine.addr()), 2)
    assert list(there.list()) == regions
    assert all(there.read(r, 0, 9) == b"%09d" % i for i, r in enumerate(regions))


@pytest.mark.parametrize("size", [1, 1024, 65_536, 1 << 30])
def test_transfer_sizes(engine: Engine, size: int) -> None:
    """Any is good, also one that exceeds what a message may hold."""
    source, _ = Provider(engine, 1, MEMORY), Provider(engine, 2, {})
    target = handle(engine, str(engine.addr()), 1)
    for i, length in enumerate((0, 1, 50, 4097, 200 if size == 1 else 1_000_000)):
        target.create_and_write(pattern(length, i))
    if size > 1:
        target.create_and_write(bytes(4_000_000))
    expected = contents(target)
    most = 0
    last = 0

    def progress(done: int, total: int) -> None:
        nonlocal most, last
        most, last = max(most, done - last), done

    source.migrate_target(str(engine.addr()), 2, {"transfer_size": size}, progress=progress)
    assert contents(handle(engine, str(engine.addr()), 2)) == expected
    assert most <= 17 * max(size + 64, 4096)


@pytest.mark.parametrize(("kind", "other"), [("memory", "file"), ("file", "memory")])
@pytest.mark.parametrize("checksums", [False, True])
def test_holes_cost_neither_time_nor_space(
    engine: Engine, tmp_path: Path, kind: str, other: str, checksums: bool
) -> None:
    """A region that is larger than any file system here, and one with many small holes; the
    destination has a quota, which counts the rest."""
    settings = config(kind, tmp_path / "here")
    if kind == "file":
        settings["target"]["config"]["checksums"] = checksums
    source, _ = Provider(engine, 1, settings), Provider(engine, 2, {})
    before, after = (handle(engine, str(engine.addr()), number) for number in (1, 2))
    size, island = 1 << 40, pattern(70_001)
    large, riddled, hole = before.create(1), before.create(1 << 20), before.create(1)
    for region in large, hole:
        before.resize(region, size)
    for offset in (0, size // 2 + 1, size - len(island)):
        before.write(large, offset, island)
    for offset in range(5000, 1 << 20, 1 << 16):
        before.write(riddled, offset, b"data")
    calls: list[tuple[int, int]] = []
    where = {"new_root": str(tmp_path / "there")} if other == "file" else {}
    limited = merge(other)
    limited["target"].setdefault("config", {})["capacity"] = 2 << 20
    source.migrate_target(
        str(engine.addr()), 2, {"merge_config": limited, **where},
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert calls[-1] == (2 * size + (1 << 20),) * 2
    assert len(calls) < 100
    for offset in (0, size // 2 + 1, size - len(island)):
        assert after.read(large, offset, len(island)) == island
    assert after.read(large, len(island), 1 << 20) == bytes(1 << 20)
    assert after.size(large) == after.size(hole) == size
    assert list(after.data_extents(hole)) == []
    assert sum(length for _, length in after.data_extents(large)) < 1 << 20
    for offset in range(5000, 1 << 20, 1 << 16):
        assert after.read(riddled, offset - 1, 6) == b"\0data\0"
    assert sum(length for _, length in after.data_extents(riddled)) < 1 << 18


def test_open_files_without_names_stay_behind(engine: Engine, client_engine: Engine) -> None:
    source, _ = Provider(engine, 1, MEMORY), Provider(engine, 2, {})
    address = str(engine.addr())
    target = handle(client_engine, address, 1)
    region = target.create_and_write(b"open")
    target.link_name(region, "/open")
    target._link.call("setxattr", region.slot, b"user.x", b"1", True)
    kept = target.create_and_write(b"kept")
    assert target._link.call("unlink", 1, b"open", True).nlink == 0
    assert target.read(region, 0, 4) == b"open"
    source.migrate_target(address, 2)
    there = handle(client_engine, address, 2)
    assert list(there.list()) == [kept]
    with pytest.raises(errors.InvalidRegion):
        there.read(region, 0, 4)


def test_every_column_of_the_catalogue_moves() -> None:
    catalogue = Catalogue(None)
    schema = {
        name: tuple(
            row[1]
            for row in catalogue._db.execute(f"PRAGMA table_info({name})")
            if row[1] != "packed"  # where the bytes are is each target's own
        )
        for (name,) in catalogue._db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
        if name not in ("meta", "checksum", "unsettled")  # sums are made anew
    }
    catalogue.abandon()
    assert schema == TABLES
