"""Targets in a pool: one owner at a time, nothing on this host, and one sentence for what fails."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import ceph
from tests.support.helpers import (
    PATIENCE,
    Served,
    environment,
    pattern,
    provider_process,
    rados_config,
)
from warabi import errors
from warabi.backends.librados import Change, Cluster, Pool
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, client
from warabi.in_process.link import DirectLink
from warabi.provider.core import ProviderCore
from warabi.server import Provider
from warabi.target.config import parse
from warabi.target.opening import open_target

pytestmark = pytest.mark.timeout(180)

STRIPE = 65536


@pytest.fixture(autouse=True)
def short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Owners that say nothing are dead sooner."""
    monkeypatch.setattr("warabi.backends.rados_owner.OWNER_SILENCE", 3.0)


@contextlib.contextmanager
def opened(path: Path, **settings: Any) -> Iterator[TargetHandle]:
    """A target of this process."""
    config = parse(rados_config(path, stripe_unit=STRIPE, **settings)).target
    assert config is not None
    core = ProviderCore(1, open_target(config))
    try:
        yield TargetHandle(DirectLink(core))
    finally:
        core.close()


@contextlib.contextmanager
def served(path: Path) -> Iterator[tuple[Served, TargetHandle]]:
    """A target of another process."""
    with (
        provider_process("na+sm", rados_config(path, stripe_unit=STRIPE)) as process,
        Engine("na+sm", client) as engine,
    ):
        yield process, Client(engine).make_target_handle(process.address, 1)


@contextlib.contextmanager
def objects(path: Path, conf: Path) -> Iterator[Pool]:
    """The objects of a target, without it."""
    with contextlib.ExitStack() as stack:
        cluster = Cluster(str(conf), "admin", None, 10, 30)
        stack.callback(cluster.close)
        found = Pool(cluster, "warabi", rados_config(path)["target"]["config"]["name"])
        stack.callback(found.close)
        yield found


def monitor(conf: Path, *command: str) -> None:
    """A command of Ceph's administrator."""
    subprocess.run(
        ["ceph", "--conf", conf, *command], check=True, timeout=PATIENCE, capture_output=True
    )


def ratios(conf: Path, *ratios: float) -> None:
    """Set which parts of devices are in use when those are nearly full, to be filled no more from
    others, and full."""
    for name, ratio in zip(("nearfull", "backfillfull", "full"), ratios, strict=True):
        monitor(conf, "osd", f"set-{name}-ratio", f"{ratio:f}")


def left() -> set[str]:
    """What catalogues may leave on this host."""
    places = ("/dev/shm", "/tmp")
    return {n for place in places for n in os.listdir(place) if n.startswith("warabi-")}


def test_what_was_persisted_survives_a_kill_and_leaves_nothing_here(
    pool: Path, tmp_path: Path
) -> None:
    path, before = tmp_path / "target", left()
    sizes = (1, 70_000, 300_000)
    with served(path) as (process, target):
        regions = {target.create_and_write(pattern(size), persist=True): size for size in sizes}
        target.mkdir("/directory")
        for number in range(50):
            target.store_name(f"/directory/{number}", pattern(9000, number))
        target.commit()
        assert left() == before
        process.kill()
    began = time.monotonic()
    with opened(path, create_if_missing=False) as target:
        assert time.monotonic() - began > 2  # in which the owner might have said something
        for region, size in regions.items():
            assert target.read(region, 0, size) == pattern(size)
        assert len(target.listdir("/directory")) == 50
        for number in range(50):
            assert target.fetch_name(f"/directory/{number}")[1] == pattern(9000, number)
    assert left() == before


def test_a_second_owner_is_refused_while_the_first_lives(pool: Path, tmp_path: Path) -> None:
    path = tmp_path / "target"
    with served(path) as (process, target):
        region = target.create_and_write(b"1234", persist=True)
        busy = f"already open in process {process.process.pid} of host {socket.gethostname()}"
        for _ in range(2):
            with pytest.raises(errors.TargetBusy, match=busy), opened(path):
                pass
        assert target.read(region, 0, 4) == b"1234"
        target.write(region, 0, b"5678", persist=True)
        process.signal(signal.SIGTERM)
        process.process.wait(PATIENCE)
    began = time.monotonic()
    with opened(path) as target:
        assert time.monotonic() - began < 2.5  # it was released
        assert target.read(region, 0, 4) == b"5678"
        with pytest.raises(errors.TargetBusy, match="already open"), opened(path):
            pass


def test_an_owner_that_was_stopped_writes_nothing_after_a_takeover(
    pool: Path, tmp_path: Path
) -> None:
    path = tmp_path / "target"
    with served(path) as (process, theirs):
        region = theirs.create_and_write(pattern(200_000), persist=True)
        process.stop()
        request = theirs.write_async(region, 0, bytes(200_000))
        with opened(path) as ours:
            ours.write(region, 0, pattern(200_000, 1), persist=True)
            ours.store_name("/file", b"ours")
            process.signal(signal.SIGCONT)
            with pytest.raises(errors.StorageError, match="another process has taken over"):
                request.wait()
            for call in (
                lambda: theirs.write(region, 5, b"late"),
                lambda: theirs.create(10),
                lambda: theirs.read(region, 0, 1),
                lambda: theirs.store_name("/other", b"theirs"),
            ):
                with pytest.raises(errors.StorageError, match="another process has taken over"):
                    call()
            theirs.mkdir("/late")  # in memory
            with pytest.raises(errors.StorageError, match="another process has taken over"):
                theirs.commit()
            assert ours.read(region, 0, 200_000) == pattern(200_000, 1)
    with opened(path) as ours:
        assert ours.read(region, 0, 200_000) == pattern(200_000, 1)
        assert sorted(ours.listdir("/")) == [region.hex(), "file"]


def test_regions_are_striped_and_holes_take_no_objects(pool: Path, tmp_path: Path) -> None:
    path = tmp_path / "target"

    def numbers(region: bytes) -> list[int]:
        with objects(path, pool) as found:
            begin = f"{rados_config(path)['target']['config']['name']}.{region.hex()}."
            names = [name for name in found.names() if name.startswith(begin)]
            return sorted(int(name.removeprefix(begin), 16) for name in names)

    with opened(path) as target:
        region = target.create(0)
        target.resize(region, STRIPE * 10 + 5)
        assert target.append(region, b"end") == STRIPE * 10 + 5
        assert numbers(region) == [0, 10]
        assert target.read(region, STRIPE * 10, 8) == bytes(5) + b"end"
        target.write(region, STRIPE * 3 - 2, b"four")
        assert numbers(region) == [0, 2, 3, 10]
        extents = list(target.data_extents(region))
        assert [offset // STRIPE for offset, _ in extents] == [2, 10]
        copy = target.copy(region)
        assert numbers(copy) == [0, 2, 3, 10]
        target.punch_hole(region, STRIPE, STRIPE * 4)
        assert numbers(region) == [0, 10]
        target.resize(region, STRIPE * 2)
        assert numbers(region) == [0, 1]
        target.resize(region, 1 << 33)  # 131072 objects, if they were there
        target.erase(region)
        target.commit()
        assert numbers(region) == []
    with opened(path, create_if_missing=False) as target:  # which has not made it
        assert target.read(copy, STRIPE * 3 - 2, 4) == b"four"
        target.resize(copy, 100)
        assert numbers(copy) == [0]
        target.erase(copy)
        target.commit()
        assert numbers(copy) == []


def test_one_of_three_devices_may_die(tmp_path: Path) -> None:
    with (
        ceph.running(tmp_path / "cluster") as conf,
        opened(tmp_path / "target", conf=str(conf)) as target,
    ):
        regions = []
        for number in range(60):
            regions.append(target.create_and_write(pattern(5000, number), persist=True))
            if number == 20:
                ceph.run("kill", 1, conf.parent)
        for number, region in enumerate(regions):
            assert target.read(region, 0, 5000) == pattern(5000, number)


def test_a_full_pool_is_reported_and_goes_on_when_there_is_space(tmp_path: Path) -> None:
    with (
        ceph.running(tmp_path / "cluster") as conf,
        opened(tmp_path / "target", conf=str(conf)) as target,
    ):
        region = target.create_and_write(pattern(100_000), persist=True)
        ratios(conf, 1e-6, 2e-6, 3e-6)
        deadline, failure = time.monotonic() + PATIENCE, ""
        while not failure and time.monotonic() < deadline:
            try:
                target.create_and_write(pattern(100_000))
            except errors.StorageFull as error:
                failure = str(error)
        assert "the pool is full" in failure
        assert target.read(region, 0, 100_000) == pattern(100_000)
        target.mkdir("/directory")
        with pytest.raises(errors.StorageFull, match="the pool is full"):
            target.commit()
        target.erase(region)
        ratios(conf, 0.85, 0.9, 0.95)
        while time.monotonic() < deadline:
            with contextlib.suppress(errors.StorageFull):
                region = target.create_and_write(pattern(100_000), persist=True)
                break
        target.commit()
        assert target.read(region, 0, 100_000) == pattern(100_000)


def test_a_pool_that_was_deleted_is_not_full_of_holes(tmp_path: Path) -> None:
    with (
        ceph.running(tmp_path / "cluster") as conf,
        pytest.raises(errors.Exception, match="do not exist any more"),
        opened(tmp_path / "target", conf=str(conf)) as target,
    ):
        region = target.create(STRIPE * 20)
        sure = "--yes-i-really-really-mean-it"
        monitor(conf, "osd", "pool", "rm", "warabi", "warabi", sure)
        with pytest.raises(errors.CorruptTarget, match="do not exist any more"):
            target.read(region, STRIPE * 5, 100)


def test_a_user_with_the_least_privileges_serves_and_takes_over(tmp_path: Path) -> None:
    path, wrong = tmp_path / "target", tmp_path / "wrong.keyring"
    wrong.write_text("[client.warabi]\nkey = AQBdvw5rFHi2MRAAZPxqJV5Fsb++t4dUVi7BHQ==\n")
    with (
        ceph.running(tmp_path / "cluster", "--auth") as conf,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("CEPH_CONF", str(conf))
        config = rados_config(path, user="warabi", stripe_unit=STRIPE)
        with provider_process("na+sm", config) as process, Engine("na+sm", client) as engine:
            target = Client(engine).make_target_handle(process.address, 1)
            region = target.create_and_write(pattern(100_000), persist=True)
            process.kill()
        keyring = tmp_path / "writer.keyring"
        caps = ("mon", "allow r", "osd", "allow rw pool=warabi", "-o", str(keyring))
        monitor(conf, "auth", "get-or-create", "client.writer", *caps)
        refused: list[tuple[dict[str, Any], type[Exception], str]] = [
            ({"user": "writer", "keyring": str(keyring)},
             errors.PermissionDenied, "may not blocklist that"),
            ({"user": "warabi", "keyring": str(wrong)},
             errors.PermissionDenied, r"refuses client\.warabi"),
            ({"user": "warabi", "keyring": str(tmp_path / "none")},
             errors.ConfigError, r"keyring of client\.warabi, is missing"),
        ]  # fmt: skip
        for settings, kind, message in refused:
            with pytest.raises(kind, match=message), opened(path, **settings):
                pass
        with opened(path, user="warabi") as target:
            assert target.read(region, 0, 100_000) == pattern(100_000)


def test_what_is_not_there_is_one_sentence(pool: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere.conf"
    nowhere.write_text("[global]\nmon host = [v2:127.0.0.1:9/0]\nauth client required = none\n")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"pool": "none"}, errors.ConfigError, "the cluster has no pool 'none'"),
        ({"create_if_missing": False}, errors.ConfigError, "no such target"),
        ({"conf": str(tmp_path / "none")}, errors.ConfigError, "is missing"),
        ({"conf": str(nowhere)}, errors.StorageError, "no monitor of the cluster responded"),
        ({"name": "a/b"}, errors.ConfigError, r"target\.config\.name"),
        ({"size": 1}, errors.ConfigError, "unknown key"),
    ]
    for settings, kind, message in cases:
        began = time.monotonic()
        with (
            pytest.raises(kind, match=message) as caught,
            opened(tmp_path / "target", **settings),
        ):
            pass
        assert time.monotonic() - began < 30
        assert "\n" not in str(caught.value)
    with objects(tmp_path / "target", pool) as found:
        name = rados_config(tmp_path / "target")["target"]["config"]["name"]
        layout = Change().create().attribute("layout", b'{"version": 9, "stripe_unit": 1}')
        found.apply(f"{name}.owner", layout)
    with pytest.raises(errors.ConfigError, match="another version"), opened(tmp_path / "target"):
        pass


def test_a_target_keeps_its_stripes_and_its_namespace(pool: Path, tmp_path: Path) -> None:
    path = tmp_path / "target"
    for namespace in ("", "one", None):
        with opened(path, namespace=namespace) as target:
            assert not [*target.list()]
            region = target.create_and_write(pattern(200_000))
        config = parse(rados_config(path, stripe_unit=1 << 20, namespace=namespace)).target
        assert config is not None
        with contextlib.closing(open_target(config)) as again:
            assert again.instead == {"stripe_unit": STRIPE}
            assert again.read(region, 0, 200_000) == pattern(200_000)


def test_targets_in_pools_are_served_elsewhere_and_not_migrated(
    pool: Path, tmp_path: Path, engine: Engine
) -> None:
    source = Provider(engine, 1, rados_config(tmp_path / "target"))
    Provider(engine, 2, {})
    target = Client(engine).make_target_handle(str(engine.addr()), 1)
    region = target.create_and_write(b"1234")
    with pytest.raises(errors.ConfigError, match="is in a pool: close it, and serve it from"):
        source.migrate_target(address=str(engine.addr()), provider_id=2)
    assert target.read(region, 0, 4) == b"1234"


def test_commands_find_targets_in_pools(pool: Path, tmp_path: Path) -> None:
    name = rados_config(tmp_path)["target"]["config"]["name"]
    archive, file = tmp_path / "archive.tar", tmp_path / "file"
    file.write_bytes(pattern(100_000))

    def warabi(*arguments: object, status: int = 0) -> str:
        program = [sys.executable, "-c", "from warabi.tools.cli.main import main; main()"]
        done = subprocess.run(
            [*program, *map(str, arguments)],
            env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stderr

    with opened(tmp_path) as target:
        target.mkdir("/directory")
    warabi("cp", file, f"rados:warabi/{name}/directory/file")
    assert warabi("ls", f"rados:warabi/{name}/directory") == "file\n"
    warabi("export", f"rados:warabi/{name}", archive)
    warabi("import", archive, f"rados:admin@warabi/{name}-copy")
    warabi("cp", f"rados:warabi/{name}-copy/directory/file", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == file.read_bytes()
    assert "fsck does not know" in warabi("fsck", f"rados:warabi/{name}", status=8)
    assert "no such target" in warabi("ls", f"rados:warabi/{name}-none", status=1)
    assert "expected rados:POOL/NAME" in warabi("ls", "rados:warabi", status=1)
    assert not [*Path.cwd().glob("rados:*")]
