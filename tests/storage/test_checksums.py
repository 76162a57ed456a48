"""Checksums of regions: what is verified, what is known to be unverified, and what is rotten."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.helpers import (
    PATIENCE,
    file_config,
    pattern,
    pmem_config,
    provider_process,
    run_python,
)
from tests.tools.test_cli import COMMAND, on_terminal, run
from warabi import errors
from warabi._core.results import Verified
from warabi.backends.checksummed import SummedStorage
from warabi.client import Client
from warabi.engine import Engine
from warabi.metadata.checksums import BLOCK
from warabi.region import RegionID
from warabi.target import opening
from warabi.target.config import FileConfig, PmemConfig
from warabi.target.named_files import store
from warabi.target.target import Target
from warabi.target.verify import update, verify

KINDS = ["file", "direct", "pmem"]


def open_target(kind: str, path: Path, **settings: Any) -> Target:
    settings = {"checksums": True, **settings}
    if kind == "pmem":
        size = settings.pop("create_if_missing_with_size", 1 << 30)
        pmem = PmemConfig(path=str(path), create_if_missing_with_size=size, **settings)
        return opening.open_pmem(pmem)
    direct = kind == "direct"
    file = FileConfig(path=str(path), create_if_missing=True, directio=direct, **settings)
    return opening.open_file(file)


def region_file(path: Path, region: RegionID) -> Path:
    name = region.hex()
    return Path(f"{path}.regions", name[-2:], name)


def flip(path: Path, region: RegionID, offset: int) -> None:
    """Change one byte of a region behind the target's back."""
    with open(region_file(path, region), "r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)
        os.fsync(file.fileno())


def seen(target: Target, region: RegionID) -> Verified:
    return verify(target, region, 0, 512)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "target"


def test_what_is_persisted_is_verified(kind: str, path: Path) -> None:
    size = 5 * BLOCK + 100
    with open_target(kind, path) as target:
        region = target.create(size)
        assert seen(target, region) == Verified(0, 6, [])
        target.write(region, 0, pattern(size))
        assert seen(target, region) == Verified(0, 6, [])
        target.persist(region, 0, size)
        assert seen(target, region) == Verified(6, 0, [])
        target.write(region, 2 * BLOCK - 1, b"ab")  # two blocks
        assert seen(target, region) == Verified(4, 2, [])
        target.persist(region, 2 * BLOCK - 1, 1)  # of which one
        assert seen(target, region) == Verified(5, 1, [])
        target.fsync(region)
        assert seen(target, region) == Verified(6, 0, [])
        stored = store(target, "/name", 0o600, 0, 0, False, True, pattern(2 * BLOCK)).region
        assert seen(target, stored) == Verified(2, 0, [])
        empty = target.create_and_write(b"", persist=True)
        assert seen(target, empty) == Verified(0, 0, [])
    for _ in range(2):
        with open_target(kind, path) as target:
            assert seen(target, region) == Verified(6, 0, [])


def test_rot_is_found_and_named(kind: str, path: Path) -> None:
    with open_target(kind, path) as target:
        region = target.create_and_write(pattern(4 * BLOCK), persist=True)
        whole = target.create_and_write(pattern(100), persist=True)
    flip(path, region, BLOCK + 5)
    flip(path, region, 4 * BLOCK - 1)
    with open_target(kind, path) as target:
        assert seen(target, region) == Verified(2, 0, [1, 3])
        assert verify(target, region, 2, 1) == Verified(1, 0, [])
        assert seen(target, whole) == Verified(1, 0, [])
        target.write(region, BLOCK, pattern(BLOCK, 1), persist=True)  # written anew
        assert seen(target, region) == Verified(3, 0, [3])


def test_sizes_that_change(kind: str, path: Path) -> None:
    with open_target(kind, path) as target:
        region = target.create_and_write(pattern(3 * BLOCK + 7), persist=True)
        target.resize(region, BLOCK + 9)
        assert seen(target, region) == Verified(1, 1, [])
        target.resize(region, 2 * BLOCK)  # what grew again is not what was there before
        assert seen(target, region) == Verified(1, 1, [])
        target.fsync(region)
        assert seen(target, region) == Verified(2, 0, [])
        target.write(region, 4 * BLOCK + 1, b"x", extend=True)  # a gap
        target.fsync(region)
        assert seen(target, region).rotten == []
        assert seen(target, region).verified >= 3
        target.resize(region, 0)
        target.fsync(region)
        assert seen(target, region) == Verified(0, 0, [])
        target.erase(region)
        again = target.create_and_write(pattern(50), persist=True)
    with open_target(kind, path) as target:
        assert seen(target, again) == Verified(1, 0, [])
        assert target._catalogue._db.execute("SELECT count(*) FROM checksum").fetchone() == (1,)
        assert target._catalogue._db.execute("SELECT * FROM unsettled").fetchall() == []


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.storage.test_checksums import BLOCK, open_target, pattern
target = open_target(sys.argv[1], Path(sys.argv[2]))
names = target.namespace
def made(name):
    return target.namespace.open_name("/" + name)
if sys.argv[3] == "make":
    for name in ("hot", "cold"):
        region = names.mknod(1, name.encode(), 0o600, 0, 0).region
        target.write(region, 0, pattern(4 * BLOCK), extend=True)
        target.fsync(region)
    target.close()
else:
    target.write(made("hot"), BLOCK + 3, b"volatile")
    target.write(made("hot"), 2 * BLOCK, b"persisted", persist=True)
    target.write(made("hot"), 3 * BLOCK, b"volatile again")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_crash_makes_no_rot(kind: str, path: Path) -> None:
    assert run_python(KILLED, kind, str(path), "make").returncode == 0
    assert run_python(KILLED, kind, str(path), "kill").returncode == -signal.SIGKILL
    with open_target(kind, path) as target:
        hot, cold = (target.namespace.open_name(name) for name in ("/hot", "/cold"))
        assert target.read(hot, BLOCK + 3, 8) == b"volatile"  # the page cache survived
        found = seen(target, hot)
        assert found.rotten == []
        assert found.unverified >= 1
        assert found.verified >= 2
        assert seen(target, cold) == Verified(4, 0, [])
        update(target, hot)
        assert seen(target, hot) == Verified(4, 0, [])
    flip(path, hot, 5)
    with open_target(kind, path) as target:  # no doubt is left: it is believed again
        assert seen(target, hot) == Verified(3, 0, [0])


def test_rot_of_an_unwritten_region_is_found_after_a_crash(kind: str, path: Path) -> None:
    assert run_python(KILLED, kind, str(path), "make").returncode == 0
    assert run_python(KILLED, kind, str(path), "kill").returncode == -signal.SIGKILL
    with open_target(kind, path) as target:
        cold = target.namespace.open_name("/cold")
    flip(path, cold, 3 * BLOCK)
    with open_target(kind, path) as target:
        assert seen(target, cold) == Verified(3, 0, [3])


def test_truncation_is_no_crash(kind: str, path: Path) -> None:
    """Recovery believes a file's size, but not against the sums."""
    assert run_python(KILLED, kind, str(path), "make").returncode == 0
    assert run_python(KILLED, kind, str(path), "kill").returncode == -signal.SIGKILL
    with open_target(kind, path) as target:
        cold = target.namespace.open_name("/cold")
    assert run_python(KILLED, kind, str(path), "kill").returncode == -signal.SIGKILL
    os.truncate(region_file(path, cold), 2 * BLOCK + 5)
    with open_target(kind, path) as target:
        assert target.size(cold) == 4 * BLOCK
        with pytest.raises(errors.CorruptTarget):
            target.read(cold, 0, 4 * BLOCK)
        assert seen(target, cold) == Verified(2, 0, [2, 3])


def test_writers_and_a_scrub_side_by_side(kind: str, path: Path) -> None:
    """Nothing that is being written is ever taken for rotten."""
    with open_target(kind, path) as target:
        region = target.create_and_write(pattern(8 * BLOCK), persist=True)
        stop = threading.Event()
        failures: list[BaseException] = []

        def write(seed: int) -> None:
            dice = random.Random(seed)
            try:
                while not stop.is_set():
                    offset = dice.randrange(8 * BLOCK - 3000)
                    data = pattern(3000, dice.randrange(10))
                    target.write(region, offset, data, persist=dice.random() < 0.5)
                    if dice.random() < 0.1:
                        target._storage.run_deferred()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=write, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(60):
            assert seen(target, region).rotten == []
        target.sync()
        stop.set()
        for thread in threads:
            thread.join()
        assert failures == []
        target.sync()
        assert seen(target, region) == Verified(8, 0, [])
    with open_target(kind, path) as target:
        assert seen(target, region) == Verified(8, 0, [])


def test_of_two_persists_the_later_one_s_sum_counts(kind: str, path: Path) -> None:
    """Also when the earlier one, which has summed older bytes, is the last to store its sum."""
    with open_target(kind, path) as target:
        region = target.create_and_write(pattern(BLOCK, 1), persist=True)
        target.write(region, 0, pattern(BLOCK, 2))
        storage = target._storage
        assert isinstance(storage, SummedStorage)
        digest, summed, go_on = storage._digest, threading.Event(), threading.Event()

        def held_up(data: memoryview) -> int:
            value = digest(data)
            summed.set()
            assert go_on.wait(PATIENCE)
            return value

        storage._digest = held_up
        earlier = threading.Thread(target=target.persist, args=(region, 0, BLOCK))
        earlier.start()
        try:
            assert summed.wait(PATIENCE)
            storage._digest = digest
            target.write(region, 0, pattern(BLOCK, 3))
            target.persist(region, 0, BLOCK)
        finally:
            go_on.set()
            earlier.join()
        assert seen(target, region) == Verified(1, 0, [])
        target.sync()
    with open_target(kind, path) as target:
        assert target.read(region, 0, BLOCK) == pattern(BLOCK, 3)
        assert seen(target, region) == Verified(1, 0, [])


# The setting


def test_sums_stay_until_they_are_switched_off(kind: str, path: Path) -> None:
    with open_target(kind, path) as target:
        region = target.create_and_write(b"x" * 100, persist=True)
        assert not target._storage.shares_writes
    with open_target(kind, path, checksums=None) as target:
        assert seen(target, region) == Verified(1, 0, [])
        target.write(region, 0, b"y", persist=True)
        assert seen(target, region) == Verified(1, 0, [])
    with open_target(kind, path, checksums=False) as target:
        assert target._storage.shares_writes
        with pytest.raises(errors.ConfigError, match="checksums"):
            seen(target, region)
        target.write(region, 0, b"z", persist=True)
    with open_target(kind, path, checksums=None) as target, pytest.raises(errors.ConfigError):
        seen(target, region)
    with open_target(kind, path) as target:
        assert seen(target, region) == Verified(0, 1, [])
        update(target, region)
        assert seen(target, region) == Verified(1, 0, [])
        assert target.read(region, 0, 2) == b"zx"


def test_without_the_library(path: Path) -> None:
    open_target("file", path, checksums=False).close()
    script = """
import sys
sys.modules["xxhash"] = None
from pathlib import Path
from tests.storage.test_checksums import open_target
open_target("file", Path(sys.argv[1]), checksums=None).close()
open_target("file", Path(sys.argv[1]))
"""
    done = run_python(script, str(path))
    assert "warabifs[checksums]" in done.stderr
    open_target("file", path).close()


def test_the_configuration_shows_whether_there_are_checksums(engine: Engine, path: Path) -> None:
    from warabi.server import Provider

    with Provider(engine, 1, file_config(path, checksums=True)) as provider:
        assert provider.get_config()["target"]["config"]["checksums"] is True
    with Provider(engine, 1, file_config(path)) as provider:
        assert provider.get_config()["target"]["config"]["checksums"] is True
    with pytest.raises(errors.ConfigError, match=r"\$\.target\.config\.checksums"):
        Provider(engine, 1, file_config(path, checksums="yes"))


# The command


def test_scrub_command(path: Path) -> None:
    assert run("scrub", path).returncode == 1  # no such target
    with open_target("file", path, checksums=False) as target:
        region = target.create_and_write(pattern(3 * BLOCK))
        target.namespace.link_name(region, "/named")
        target.create_and_write(pattern(10))
    done = run("scrub", path)
    assert done.returncode == 1
    assert b"no checksums" in done.stderr
    done = run("scrub", "--update", path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"2 regions: 4 blocks verified, 0 unverified, 0 rotten\n"
    flip(path, region, BLOCK)
    flip(path, region, 2 * BLOCK)
    done = run("scrub", path)
    assert (done.returncode, done.stderr) == (1, b"")
    rotten, total = done.stdout.decode().splitlines()
    where = f"{2 * BLOCK} bytes at {BLOCK}"
    assert rotten == f"region {region.hex()} (/named): {where} are damaged"
    assert total == "2 regions: 2 blocks verified, 0 unverified, 2 rotten"


def test_scrub_of_a_served_target(path: Path, client_engine: Engine) -> None:
    configs = [file_config(path, checksums=True), pmem_config(path.with_name("pmem"))]
    with provider_process("na+sm", *configs) as served:
        target = Client(client_engine).make_target_handle(served.address, 1)
        region = target.create_and_write(pattern(BLOCK + 1), persist=True)
        target.write(target.create(10), 0, b"volatile")
        done = run("scrub", "-p", "1", served.address)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout == b"2 regions: 2 blocks verified, 1 unverified, 0 rotten\n"
        flip(path, region, 0)
        assert run("scrub", "-p", "1", served.address).returncode == 1
        assert b"no checksums" in run("scrub", "-p", "2", served.address).stderr
        done = run("scrub", path)
        assert done.returncode == 1
        assert b"already open" in done.stderr


def test_progress_is_shown_on_a_terminal(path: Path) -> None:
    with open_target("file", path) as target:
        target.create_and_write(pattern(3 * BLOCK))
    assert b"scrub" in on_terminal(80, "scrub", path)
    without = [COMMAND[0], "-c", f"import sys; sys.modules['rich'] = None; {COMMAND[2]}"]
    report = on_terminal(80, "scrub", path, command=without)
    assert report == b"1 regions: 3 blocks verified, 0 unverified, 0 rotten\r\n"
