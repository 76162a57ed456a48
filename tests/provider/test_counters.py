"""Counters of a provider's requests: exact for what clients did, and the state that goes with
them."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.helpers import (
    MEMORY,
    RawPeer,
    eventually,
    file_config,
    provider_process,
    raw_connection,
)
from warabi import errors
from warabi._core.counters import Counters, quantile
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, client
from warabi.region import RegionID

NOT_SHARED = {"share": False}
"""Engine configuration: every access is a request."""


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine("na+sm", client, config=NOT_SHARED) as engine:
        yield engine


def stats(target: TargetHandle) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(target.link.call("stats"))
    return found


def operations(target: TargetHandle) -> dict[str, Any]:
    found: dict[str, Any] = stats(target)["targets"][0]["operations"]
    return found


def counts(target: TargetHandle) -> dict[str, int]:
    return {name: one["count"] for name, one in operations(target).items()}


def moved(target: TargetHandle) -> dict[str, int]:
    return {name: one["bytes"] for name, one in operations(target).items() if one["bytes"]}


@pytest.mark.parametrize("kind", ["memory", "file"])
@pytest.mark.parametrize("transport", ["na+sm", "tcp"])
def test_operations_and_bytes_are_counted(transport: str, kind: str, tmp_path: Path) -> None:
    config = MEMORY if kind == "memory" else file_config(tmp_path / "target")
    with (
        provider_process(transport, config) as served,
        Engine(transport, client, config=NOT_SHARED) as engine,
    ):
        target = Client(engine).make_target_handle(served.address, 1)
        sizes = [1, 4096, 100_000, 3_000_000, 9_000_001]
        regions = [target.create_and_write(os.urandom(size)) for size in sizes[:2]]
        for size in sizes:
            region = target.create(size)
            target.write(region, 0, bytes(size))
            assert target.read(region, 0, size) == bytes(size)
            target.stat(region)
            regions.append(region)
        target.append(regions[0], b"appended")
        target.persist(regions[0], 0, 1)
        for region in regions:
            target.erase(region)

        total = sum(sizes)
        eventually(lambda: counts(target).get("erase") == len(regions))
        found = counts(target)
        assert found["create_and_write"] == 2
        assert found["create"] == found["stat"] == len(sizes)
        assert found["append"] == found["persist"] == 1
        # The largest are split, as the limits of one message say.
        assert found["write"] == found["read"] == sum(math.ceil(s / (4 << 20)) for s in sizes)
        assert moved(target) == {
            "create_and_write": 4097, "write": total, "read": total, "append": 8,
        }  # fmt: skip


def test_histograms_and_durations_belong_together(engine: Engine) -> None:
    with provider_process("na+sm", MEMORY) as served:
        target = Client(engine).make_target_handle(served.address, 1)
        for _ in range(100):
            target.link.call("used")
        found = operations(target)["used"]
        assert sum(count for _, count in found["buckets"]) == found["count"] == 100
        most = sum(bound * count for bound, count in found["buckets"])
        assert most / 2 <= found["seconds"] <= most
        assert found["buckets"][0][0] / 2 <= quantile(found["buckets"], 0.5)


def test_errors_are_counted_by_kind_and_the_unusual_ones_kept(engine: Engine) -> None:
    with provider_process("na+sm", MEMORY) as served:
        target = Client(engine).make_target_handle(served.address, 1)
        unknown = RegionID(bytes(16))
        for _ in range(3):
            with pytest.raises(errors.InvalidRegion):
                target.size(unknown)
        for _ in range(5):
            with pytest.raises(FileNotFoundError):
                target.open_name("/nothing")
        with pytest.raises(errors.OutOfBounds):
            target.read(target.create(1), 0, 2)
        eventually(lambda: counts(target).get("read") == 1)
        report = stats(target)["targets"][0]
        failed = {name: one["errors"] for name, one in report["operations"].items()}
        assert failed["size"] == {"InvalidRegion": 3}
        assert failed["open_name"] == {"ENOENT": 5}
        assert failed["read"] == {"OutOfBounds": 1}
        assert failed["create"] == {}
        kept = [(one["operation"], one["error"]) for one in report["failures"]]
        assert kept == [("size", "InvalidRegion")] * 3 + [("read", "OutOfBounds")]
        assert all(one["client"] == f"process {os.getpid()}" for one in report["failures"])


def test_names_of_operations_that_do_not_exist_are_not_kept() -> None:
    with provider_process("na+sm", MEMORY) as served, raw_connection(served.address) as connection:
        peer = RawPeer(connection)
        for number in range(1000):
            assert peer.call([number, 1, f"no{number}", [], None])[3]
        report = json.loads(peer.call([1000, 1, "stats", [], None])[1])
        (name,) = report["targets"][0]["operations"]
        assert name == "unknown"
        assert report["targets"][0]["operations"][name]["errors"] == {"ProtocolError": 1000}
        assert len(report["targets"][0]["failures"]) == 50


def test_providers_are_counted_apart(engine: Engine, tmp_path: Path) -> None:
    with provider_process("na+sm", MEMORY, file_config(tmp_path / "target"), {}) as served:
        first, second, third = (
            Client(engine).make_target_handle(served.address, number) for number in (1, 2, 3)
        )
        first.create(1000)
        second.create(10_000)
        second.create(20_000)
        assert (counts(first), counts(second), counts(third)) == ({"create": 1}, {"create": 2}, {})
        report = stats(second)
        assert report["provider_ids"] == [1, 2, 3]
        (provider,) = report["targets"]
        assert (provider["provider_id"], provider["type"]) == (2, "file")
        assert provider["path"] == str(tmp_path / "target")
        target = provider["target"]
        assert target["uuid"] == second.link.call("uuid")
        assert (target["regions"], target["used"]) == (2, 30_000)
        assert 0 < target["available"] <= target["total"]
        assert target["file_opens"] == 0  # a new file is open already
        second.write(next(second.list()), 0, b"x")
        assert stats(second)["targets"][0]["target"]["open_files"] > 0
        (empty,) = stats(third)["targets"]
        assert empty["target"] is None
        assert empty["error"] == "provider 3 has no target"


def test_clients_come_and_go() -> None:
    with (
        provider_process("tcp", MEMORY) as served,
        Engine("tcp", client) as engine,
    ):
        target = Client(engine).make_target_handle(served.address, 1)
        for _ in range(20):
            with Engine("tcp", client) as other:
                Client(other).make_target_handle(served.address, 1, True).link.call("used")
                report = stats(target)
                assert report["connections"]["open"] == len(report["clients"]) == 2
                assert [one["read_only"] for one in report["clients"]] == [False, True]
                assert report["clients"][1]["client"].startswith("127.0.0.1 port ")
            eventually(lambda: stats(target)["connections"]["open"] == 1)
        report = stats(target)
        assert report["connections"]["accepted"] == 21
        assert report["clients"][0]["requests"] > 20
        assert report["pid"] == served.process.pid
        assert 0 < report["open_fds"] <= report["max_fds"]


def test_the_slowest_are_kept_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("warabi._core.counters.time.time", lambda: now[0])
    counters = Counters()
    durations = random.Random(0).sample(range(1, 1_000_000), 1000)
    for duration in durations:
        counters.add("read", duration)
    expected = sorted(durations)[:-21:-1]
    assert [round(slow.seconds * 1e9) for slow in counters.slowest()] == expected
    now[0] += 601  # they are old now, and do not keep others out
    assert counters.slowest() == []
    counters.add("read", 5)
    assert [round(slow.seconds * 1e9) for slow in counters.slowest()] == [5]


def test_readers_do_not_disturb_the_counting_thread() -> None:
    counters, done = Counters(), threading.Event()

    def read() -> None:
        while not done.is_set():
            snapshot = counters.snapshot()
            assert all(
                sum(n for _, n in one["buckets"]) == one["count"] for one in snapshot.values()
            )
            counters.totals()

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(20_000):
        counters.add(f"operation {number % 500}", number)
        if number % 10 == 0:
            counters.fail(f"operation {number % 700}", errors.path_error(errno.ENOENT, "gone"))
    done.set()
    reader.join()
    assert counters.totals() == (20_000, 2000, 0)


def test_quantiles() -> None:
    assert quantile([], 0.5) == 0.0
    assert quantile([(1.0, 10)], 1.0) == 1.0
    assert quantile([(1.0, 10), (8.0, 10)], 0.75) == 6.0
