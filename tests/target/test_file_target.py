"""Targets on a file system: what a path may be, who owns it, and what a crash leaves."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.helpers import (
    PATIENCE,
    environment,
    file_config,
    pattern,
    python_process,
    run_python,
)
from warabi import errors
from warabi.backends import xattr_times
from warabi.client import Client, TargetHandle
from warabi.engine import Engine
from warabi.region import RegionID
from warabi.server import Provider
from warabi.target import opening
from warabi.target.config import FileConfig, parse
from warabi.target.target import Target


def open_target(path: Path, **settings: Any) -> Target:
    return opening.open_file(FileConfig(path=str(path), **{"create_if_missing": True, **settings}))


def existing(path: Path) -> Target:
    return open_target(path, create_if_missing=False)


@contextlib.contextmanager
def handle(engine: Engine, path: Path, **settings: Any) -> Iterator[TargetHandle]:
    with Provider(engine, 1, file_config(path, **settings)):
        yield Client(engine).make_target_handle(str(engine.addr()), 1)


def tree(path: Path) -> dict[str, bytes]:
    """Every file at and below *path* with its content."""
    return {str(p): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "target"


# Configuration


@pytest.mark.parametrize(
    ("config", "where", "what"),
    [
        ({"unknown": 1}, "$.unknown", "unknown key"),
        ({"target": {}}, "$.target", "type"),
        ({"target": {"type": "nothing"}}, "$.target.type", "'nothing'"),
        ({"target": {"type": "file"}}, "$.target.config", "missing"),
        ({"target": {"type": "file", "config": {}}}, "$.target.config.path", "missing"),
        ({"target": {"type": "abtio", "config": {"path": 5}}}, "$.target.config.path", "string"),
        ({"target": {"type": "file", "config": {"path": ""}}}, "$.target.config.path", "1"),
        (file_config(Path("/x"), create_if_missing=1), "$.target.config.create_if_missing", "bool"),
        (file_config(Path("/x"), alignment=12), "$.target.config.alignment", "8"),
        (file_config(Path("/x"), alignment=0), "$.target.config.alignment", "8"),
        (file_config(Path("/x"), capacity=-1), "$.target.config.capacity", "0"),
        (file_config(Path("/x"), typo=1), "$.target.config.typo", "unknown key"),
        (file_config(Path("/x"), abt_io=1), "$.target.config.abt_io", "object"),
        (file_config(Path("/x\0y")), "$.target.config.path", "null"),
        ({"target": {"typ": "memory"}}, "$.target.type", "required key is missing"),
        ({"target": {"type": "memory", "typo": 1}}, "$.target.typo", "unknown key"),
        ({"target": {"type": "memory", "config": {"path": ""}}}, "$.target.config.path", "unknown"),
        ({"transfer_manager": {"type": "x"}}, "$.transfer_manager.type", "'x'"),
        (
            {"transfer_manager": {"type": "pipeline", "config": {"num_pools": 1}}},
            "$.transfer_manager.config.first_buffer_size",
            "missing",
        ),
        (
            {"transfer_manager": {"type": "__default__", "config": {"num_pools": 1}}},
            "$.transfer_manager.config.num_pools",
            "unknown key",
        ),
        ([], "$", "object"),
        ("{", "JSON", ""),
        ("[" * 100_000, "JSON", ""),
    ],
)
def test_wrong_configuration_is_refused_with_its_json_path(
    engine: Engine, config: Any, where: str, what: str
) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        Provider(engine, 1, config)
    assert where in str(caught.value)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_pools", 0), ("num_buffers_per_pool", 0), ("first_buffer_size", 0),
     ("buffer_size_multiplier", 1), ("num_pools", 1.5), ("num_pools", True), ("num_pools", "1")],
)  # fmt: skip
def test_pipeline_settings_are_checked(key: str, value: object) -> None:
    config = {"num_pools": 1, "num_buffers_per_pool": 1, "first_buffer_size": 1,
              "buffer_size_multiplier": 2}  # fmt: skip
    assert parse({"transfer_manager": {"type": "pipeline", "config": config}})
    with pytest.raises(errors.ConfigError, match=key):
        parse({"transfer_manager": {"type": "pipeline", "config": {**config, key: value}}})


def test_effective_configuration_has_the_defaults(engine: Engine, path: Path) -> None:
    with Provider(engine, 1, json.dumps(file_config(path))) as provider:
        assert provider.get_config() == {
            "target": {
                "type": "file",
                "config": {
                    "path": str(path), "create_if_missing": True, "override_if_exists": False,
                    "alignment": 8, "directio": False, "sync": False, "abt_io": {},
                },
            },
            "transfer_manager": {"type": "__default__", "config": {}},
        }  # fmt: skip


def test_keys_for_compatibility_are_accepted(engine: Engine, path: Path) -> None:
    settings = {"alignment": 4096, "abt_io": {"num_threads": 4, "internal_pool": {"kind": "x"}}}
    with handle(engine, path, **settings) as target:
        assert target.read(target.create_and_write(b"x"), 0, 1) == b"x"


# What a path may be


def test_missing_without_create(path: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="create_if_missing"):
        existing(path)
    assert list(tmp_path.iterdir()) == []


def test_override_needs_create(path: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match=r"\$\.target\.config\.override_if_exists"):
        open_target(path, create_if_missing=False, override_if_exists=True)
    assert list(tmp_path.iterdir()) == []


def test_parents_are_made_when_the_target_is(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "target"
    open_target(path).close()
    assert path.is_file()


def test_foreign_things_are_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "text").write_text("somebody's work")
    (tmp_path / "long").write_bytes(pattern(5000))
    (tmp_path / "zeros").write_bytes(bytes(5000))
    with contextlib.closing(sqlite3.connect(tmp_path / "database")) as database:
        database.execute("CREATE TABLE inode(ino)")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "fifo")
    before = tree(tmp_path)
    names = sorted(os.listdir(tmp_path))
    for name in [*names, "text/below"]:
        for override in (False, True):
            with pytest.raises(errors.Exception, match=name.split("/")[0]) as caught:
                open_target(tmp_path / name, override_if_exists=override)
            assert type(caught.value) is errors.ConfigError or name == "loop"
    assert tree(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == names


@pytest.mark.parametrize("content", [{"precious/file": b"x"}, {"ab/file": b"x"}, {"file": b"x"}])
def test_foreign_directory_where_the_regions_would_be(
    path: Path, content: dict[str, bytes]
) -> None:
    regions = Path(f"{path}.regions")
    for name, data in content.items():
        (regions / name).parent.mkdir(parents=True, exist_ok=True)
        (regions / name).write_bytes(data)
    before = tree(path.parent)
    with pytest.raises(errors.ConfigError, match="not modified"):
        open_target(path)
    assert tree(path.parent) == before


def test_file_where_the_regions_would_be(path: Path) -> None:
    regions = Path(f"{path}.regions")
    regions.write_text("mine")
    with pytest.raises(errors.ConfigError, match="not modified"):
        open_target(path)
    assert regions.read_text() == "mine"
    assert not path.exists()


@pytest.mark.parametrize("create", [False, True])
def test_empty_file_becomes_a_target(path: Path, create: bool) -> None:
    path.touch()
    with open_target(path, create_if_missing=create) as target:
        region = target.create_and_write(b"x", persist=True)
    with existing(path) as target:
        assert target.read(region, 0, 1) == b"x"


def test_symlink_to_a_target_is_that_target(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    with open_target(path) as target:
        region = target.create_and_write(b"x")
        link.symlink_to(path)
        with pytest.raises(errors.TargetBusy):
            open_target(link)
    with open_target(link) as target:
        assert target.read(region, 0, 1) == b"x"
    assert link.is_symlink()
    open_target(link, override_if_exists=True).close()
    assert link.is_symlink()
    with existing(path) as target:
        assert target.list() == []


UNPRIVILEGED = """
import os, sys
from warabi import errors
from warabi.target import opening as layout
from warabi.target.config import FileConfig
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for path in sys.argv[1:]:
    try:
        layout.open_file(FileConfig(path=path, create_if_missing=True))
    except errors.Exception as error:
        print(type(error).__name__)
"""


def test_paths_without_permission(tmp_path: Path) -> None:
    # Below pytest's own directory nobody else may pass.
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)
    target, below = tmp_path / "target", tmp_path / "closed" / "target"
    open_target(target).close()
    below.parent.mkdir(mode=0o555)
    target.chmod(0o444)
    done = run_python(UNPRIVILEGED, str(target), str(below), str(tmp_path / "closed" / "a" / "b"))
    assert done.stderr == ""
    assert done.stdout.split() == ["PermissionDenied"] * 3
    target.chmod(0o644)
    below.parent.chmod(0o755)
    existing(target).close()


def test_override_starts_empty(path: Path) -> None:
    with open_target(path) as target:
        old = target.create_and_write(pattern(100), persist=True)
        target.namespace.link_name(old, "/name")
        uuid = target.uuid
    with open_target(path, override_if_exists=True) as target:
        assert target.list() == []
        assert target.uuid != uuid
        with pytest.raises(errors.InvalidRegion):
            target.size(old)
    assert [p for p in Path(f"{path}.regions").rglob("*") if len(p.name) == 32] == []


def test_newer_schema_is_refused(path: Path) -> None:
    open_target(path).close()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 99")
    before = path.read_bytes()
    for override in (False, True):
        with pytest.raises(errors.ConfigError, match="99"):
            open_target(path, override_if_exists=override)
    assert path.read_bytes() == before


def test_corrupted_catalogues(path: Path) -> None:
    with open_target(path) as target:
        for _ in range(2000):
            target.create(1)
    whole = path.read_bytes()
    damaged = [
        whole[:4096],
        whole[: len(whole) // 2],
        whole[:100] + b"\xff" * 4000 + whole[4100:],
        whole[:4096] + b"\xee" * (len(whole) - 4096),
    ]
    for content in damaged:
        path.write_bytes(content)
        for _ in range(2):
            with pytest.raises(errors.CorruptTarget, match="target"), existing(path) as target:
                list(target.regions())
    path.write_bytes(whole)
    with existing(path) as target:
        assert len(list(target.regions())) == 2000


def test_incomplete_catalogue(path: Path) -> None:
    open_target(path).close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("DELETE FROM meta WHERE key = 'uuid'")
    with pytest.raises(errors.CorruptTarget):
        existing(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("DROP TABLE inode")
    with pytest.raises(errors.CorruptTarget):
        existing(path)


def test_region_whose_file_is_gone_or_short_is_unreadable(path: Path) -> None:
    with open_target(path) as target:
        gone, short, whole = (target.create_and_write(b"12345678" * 1024) for _ in range(3))
    files = {p.name: p for p in Path(f"{path}.regions").rglob("*") if len(p.name) == 32}
    files[gone.hex()].unlink()
    os.truncate(files[short.hex()], 4)
    with existing(path) as target:
        for region in (gone, short):
            with pytest.raises(errors.CorruptTarget, match=region.hex()):
                target.read(region, 0, 8)
        assert target.read(whole, 0, 8) == b"12345678"
        target.erase(gone)
        target.erase(short)
        assert target.list() == [whole]


# One owner


def test_open_elsewhere_in_this_process(engine: Engine, path: Path) -> None:
    with handle(engine, path) as target:
        region = target.create_and_write(b"x")
        with pytest.raises(errors.TargetBusy, match=str(os.getpid())):
            Provider(engine, 2, file_config(path))
        with pytest.raises(errors.TargetBusy):
            Provider(engine, 2, file_config(path, override_if_exists=True))
        assert target.read(region, 0, 1) == b"x"
        target.persist(region, 0, 1)
    with existing(path) as reopened:
        assert reopened.read(region, 0, 1) == b"x"


HOLD = """
import sys
from warabi.target import opening as layout
from warabi.target.config import FileConfig
target = layout.open_file(FileConfig(path=sys.argv[1], create_if_missing=True))
print(target.create_and_write(b"theirs", persist=True).hex(), flush=True)
sys.stdin.read()
target.close()
"""


def test_open_in_another_process(path: Path) -> None:
    with python_process("-c", HOLD, str(path)) as process:
        assert process.stdout is not None
        region = RegionID(bytes.fromhex(process.stdout.readline()))
        for override in (False, True):
            with pytest.raises(errors.TargetBusy, match=str(process.pid)):
                open_target(path, override_if_exists=override)
        process.communicate(timeout=PATIENCE)
    with existing(path) as target:
        assert target.read(region, 0, 6) == b"theirs"


def test_an_unreferenced_provider_releases_its_target(engine: Engine, path: Path) -> None:
    """A script may make its provider anew, of the same ID or on the same path."""
    Provider(engine, 1, file_config(path))
    Provider(engine, 1, file_config(path))
    Provider(engine, 2, file_config(path))
    kept = Provider(engine, 3, file_config(path))
    with pytest.raises(errors.ConfigError, match="provider_id: 3 is taken"):
        Provider(engine, 3, {})
    with pytest.raises(errors.TargetBusy):
        Provider(engine, 4, file_config(path))
    assert kept


# Life and death


def test_path_is_a_regular_file_and_may_be_unlinked(engine: Engine, path: Path) -> None:
    with handle(engine, path) as target:
        assert os.path.getsize(path) > 0
        assert path.is_file()
        os.unlink(path)
        region = target.create_and_write(pattern(10_000), persist=True)
        assert target.read(region, 0, 10_000) == pattern(10_000)
        target.link_name(region, "/name")
        target.resize(region, 20_000)
        target.persist(region, 0, 20_000)
        target.erase(region)
    assert list(path.parent.iterdir()) == []


def test_unlinked_and_made_anew_while_open(engine: Engine, path: Path) -> None:
    with handle(engine, path):
        os.unlink(path)
        with pytest.raises(errors.TargetBusy):
            open_target(path)
    assert list(path.parent.iterdir()) == []
    open_target(path).close()


def test_reopen_keeps_everything(engine: Engine, path: Path) -> None:
    data = {size: pattern(size) for size in (0, 1, 4096, 100_000, 3_000_000)}
    with handle(engine, path) as target:
        regions = {target.create_and_write(content): content for content in data.values()}
        for i, region in enumerate(list(regions)[::2]):
            target.link_name(region, f"/name {i}")
            target.link_name(region, f"/also {i}")
        erased = target.create(5)
        target.erase(erased)
        stats = {region: target.stat(region) for region in regions}
        names = list(target.list_names())
        listed = list(target.list())
    for _ in range(2):
        with handle(engine, path, create_if_missing=False) as target:
            assert list(target.list()) == listed
            assert list(target.list_names()) == names
            for region, content in regions.items():
                assert target.read(region, 0, len(content)) == content
                assert target.stat(region) == stats[region]
            with pytest.raises(errors.InvalidRegion):
                target.size(erased)
            assert target.open_name("/name 0") == listed[0]


def test_closing_twice_and_use_after(path: Path) -> None:
    target = open_target(path)
    region = target.create(1)
    target.close()
    target.close()
    for call in (lambda: target.read(region, 0, 1), lambda: target.create(1), target.commit):
        with pytest.raises(errors.TargetNotFound):
            call()


def test_quota(engine: Engine, path: Path) -> None:
    with handle(engine, path, capacity=1000) as target:
        region = target.create(600)
        for call in (lambda: target.create(401), lambda: target.resize(region, 1001),
                     lambda: target.create_and_write(bytes(401)),
                     lambda: target.store_name("/name", bytes(401))):  # fmt: skip
            with pytest.raises(errors.StorageFull, match="1000"):
                call()
        assert target.listdir() == [region.hex()]
        other = target.store_name("/name", bytes(400)).region
        with pytest.raises(errors.StorageFull):
            target.create(1)
        target.create(0)
        target.erase(other)
        target.resize(region, 100)
        assert target.size(target.create(900)) == 900
    with handle(engine, path, capacity=1000) as target, pytest.raises(errors.StorageFull):
        target.create(1)  # what is used survives


def test_persist_after_a_full_disk_raises_storage_full(path: Path) -> None:
    """A file system without room: StorageFull, and what was persisted stays."""
    # A limit on file sizes stands in for the full medium.
    script = """
import resource, signal, sys
from pathlib import Path
from warabi import errors
from warabi.target import opening as layout
from warabi.target.config import FileConfig
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
target = layout.open_file(FileConfig(path=sys.argv[1], create_if_missing=True, packed=False))
kept = target.create_and_write(b"kept", persist=True)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
grown = target.create(4000)
for call in (lambda: target.create(10_000), lambda: target.resize(grown, 10_000),
             lambda: target.create_and_write(bytes(6000))):
    try:
        call()
    except errors.Exception as error:
        print(type(error).__name__)
target.write(grown, 0, b"y" * 4000)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
assert target.read(kept, 0, 4) == b"kept" and target.read(grown, 0, 4000) == b"y" * 4000
assert target.size(grown) == 4000 and len(target.list()) == 2
target.close()
"""
    done = run_python(script, str(path))
    assert done.stderr == ""
    assert done.stdout.split() == ["OutOfBounds"] * 3


# Crashes

CRASH = """
import json, os, signal, sys
from warabi.target import opening as layout
from warabi.target.config import FileConfig
target = layout.open_file(FileConfig(path=sys.argv[1], create_if_missing=True))
space = target.namespace
say = {}
def file(name, data, persist):
    attributes = space.mknod(1, name.encode(), 0o640, 1000, 1000)
    target.write(attributes.region, 0, data, extend=True)
    if persist:
        target.persist(attributes.region, 0, len(data))
    say[name] = attributes.region.hex()
erased = target.create_and_write(b"erased", persist=True)
file("persisted", b"p" * 100_000, True)
say["nameless"] = target.create_and_write(b"n" * 5000, persist=True).hex()
target.erase(erased)
target.commit()
say["erased"] = erased.hex()
file("volatile", b"v" * 100_000, False)
say["late"] = target.create_and_write(b"late").hex()
target.write(space.open_name("/persisted"), 100_000, b"q" * 10, extend=True)
print(json.dumps(say), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_after_persist(path: Path) -> None:
    done = run_python(CRASH, str(path))
    assert done.returncode == -signal.SIGKILL, done.stderr
    regions = {key: RegionID(bytes.fromhex(text)) for key, text in json.loads(done.stdout).items()}
    with existing(path) as target:
        assert target.namespace.open_name("/persisted") == regions["persisted"]
        assert target.read(regions["persisted"], 0, 100_000) == b"p" * 100_000
        assert target.read(regions["nameless"], 0, 5000) == b"n" * 5000
        with pytest.raises(errors.InvalidRegion):
            target.size(regions["erased"])
        # What was never persisted is there or not, whole or old, and harms nobody.
        for region in target.list():
            target.read(region, 0, target.size(region))
        assert target.namespace.getattr(1).nlink == 2
        entries = [name for name, _ in target.namespace.readdir(1)]
        assert set(entries) <= {
            b"persisted",
            b"volatile",
            *(r.hex().encode() for r in target.list()),
        }
        listed = set(target.list())
        files = {p.name for p in Path(f"{path}.regions").rglob("*") if len(p.name) == 32}
        assert files == {region.hex() for region in listed}
        fresh = target.create(100)
        assert fresh not in regions.values()
        assert target.read(fresh, 0, 100) == bytes(100)


ENDLESS = """
import os, sys
from warabi.target import opening as layout
from warabi.target.config import FileConfig
target = layout.open_file(FileConfig(path=sys.argv[1], create_if_missing=True))
space = target.namespace
number = len(target.list())
while True:
    data = number.to_bytes(4, "big") * (1 + number * 37 % 5000)
    made = space.mknod(1, b"%d.new" % number, 0o600, 0, 0)
    target.write(made.region, 0, data, extend=True)
    if number % 3 == 0:
        target.fsync(made.region)
    space.rename(1, b"%d.new" % number, 1, b"%d" % number)
    if number % 5 == 0:
        target.create_and_write(b"garbage")
    if number % 3 == 0:
        target.fsync(made.region)
        print(number, made.region.hex(), flush=True)
    number += 1
"""


def test_kill_at_any_time(path: Path) -> None:
    """What was said to be durable is there under its name and ID; the rest harms nobody."""
    durable: dict[int, str] = {}
    for lines in (1, 10, 40, 100, 150):
        with python_process("-c", ENDLESS, str(path)) as process:
            assert process.stdout is not None
            for _ in range(lines):
                number, region = process.stdout.readline().split()
                durable[int(number)] = region
            process.kill()
            for line in process.stdout.read().splitlines(keepends=True):
                if line.endswith("\n"):
                    number, region = line.split()
                    durable[int(number)] = region
        with existing(path) as target:
            for n, text in durable.items():
                region_id = target.namespace.open_name(f"/{n}")
                assert region_id.hex() == text
                data = n.to_bytes(4, "big") * (1 + n * 37 % 5000)
                assert target.read(region_id, 0, target.size(region_id)) == data
            for found in target.regions():
                target.read(found, 0, target.size(found))
            if lines < 100:  # numbers go on from here
                for name, attributes in target.namespace.readdir(1, limit=10_000):
                    if not name.isdigit() or int(name) > max(durable):
                        target.erase(attributes.region)
                while len(target.list(limit=10_000)) <= max(durable):
                    target.create(0)


def test_orphaned_files_are_removed_after_a_crash_only(path: Path) -> None:
    done = run_python(CRASH, str(path))
    regions = Path(f"{path}.regions")
    shard = next(p for p in regions.iterdir() if p.is_dir())
    orphan = shard / ("0" * 15 + "9" + "1" * 14 + shard.name)
    orphan.write_bytes(b"unfinished")
    (regions / "note").write_text("somebody's")
    (shard / "short name").write_text("somebody's")
    with existing(path) as target:
        assert RegionID(bytes.fromhex(json.loads(done.stdout)["persisted"])) in target.list()
    assert not orphan.exists()
    assert (regions / "note").exists()
    assert (shard / "short name").exists()


def test_file_held_open_when_its_process_dies_is_gone(path: Path) -> None:
    script = """
import os, signal, sys
from warabi.target import opening as layout
from warabi.target.config import FileConfig
target = layout.open_file(FileConfig(path=sys.argv[1], create_if_missing=True))
made = target.namespace.mknod(1, b"open", 0o600, 0, 0, pin=True)
target.write(made.region, 0, b"x", extend=True)
target.namespace.unlink(1, b"open")
target.write(made.region, 0, b"still usable", extend=True)
assert target.read(made.region, 0, 5) == b"still"
target.fsync(made.region)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run_python(script, str(path))
    assert done.returncode == -signal.SIGKILL, done.stderr
    with existing(path) as target:
        assert target.list() == []
        assert target.namespace.readdir(1) == []
    assert [p for p in Path(f"{path}.regions").rglob("*") if len(p.name) == 32] == []


def test_crash_while_being_made_leaves_nothing_that_blocks(path: Path) -> None:
    Path(f"{path}.new").write_bytes(b"half a catalogue")
    Path(f"{path}.regions").mkdir()
    Path(f"{path}.regions", "LOCK").write_text("1\n")
    with open_target(path) as target:
        target.create(1)
    assert not Path(f"{path}.new").exists()


def test_more_regions_than_descriptors(path: Path) -> None:
    script = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))
from warabi.target import opening as layout
from warabi.target.config import FileConfig
target = layout.open_file(FileConfig(path=sys.argv[1], create_if_missing=True))
regions = [target.create_and_write(b"%04d" % i) for i in range(400)]
for i, region in enumerate(regions):
    assert target.read(region, 0, 4) == b"%04d" % i
    target.write(region, 0, b"%04d" % (i + 1))
target.close()
target = layout.open_file(FileConfig(path=sys.argv[1]))
for i, region in enumerate(regions):
    assert target.read(region, 0, 4) == b"%04d" % (i + 1)
target.close()
"""
    done = run_python(script, str(path))
    assert (done.returncode, done.stderr) == (0, "")


def test_dev_full_is_no_target() -> None:
    with pytest.raises(errors.ConfigError, match="not a regular file"):
        open_target(Path("/dev/full"))


def test_child_of_a_killed_owner_is_waited_for(path: Path) -> None:
    """Between fork(2) and execve(2) it has what its parent had open."""
    script = """
import os, signal, sys, time
from warabi.target import opening as layout
from warabi.target.config import FileConfig
target = layout.open_file(FileConfig(path=sys.argv[1], create_if_missing=True))
if os.fork() == 0:
    time.sleep(0.5)
    os._exit(0)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], env=environment(), timeout=PATIENCE, check=False
    )
    assert done.returncode == -signal.SIGKILL
    open_target(path).close()


def test_process_that_holds_the_lock_is_named_though_stopped(path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(errors.TargetBusy, match=str(process.pid)):
                open_target(path)
        finally:
            process.kill()
    open_target(path).close()


# How much is waited for


FLUSHES = """
import os, sys
from warabi.target import commit as durability, opening as layout
from warabi.target.config import FileConfig
durability.COMMIT_INTERVAL = 3600
target = layout.open_file(FileConfig(path=sys.argv[1], create_if_missing=True))
region = target.create_and_write(bytes(9000), persist=True)
target.fsync(region)
actions = {
    "fsync": lambda: (target.write(region, 0, b"x" * 4096), target.fsync(region)),
    "seen": lambda: (target.write(region, 0, b"x"), target.fsync(region), target.stat(region)),
    "fdatasync": lambda: (target.write(region, 9, b"x"), target.fsync(region, times=False)),
    "persist": lambda: target.write(region, 99, b"x" * 4096, persist=True),
    "append": lambda: (
        target.write(region, target.size(region), b"x" * 4096, extend=True), target.fsync(region)),
    "resize": lambda: (target.resize(region, 50), target.persist(region, 0, 50)),
}
for _ in range(20):
    actions[sys.argv[2]]()
os._exit(0)
"""


@pytest.mark.parametrize("kind", ["fsync", "seen", "fdatasync", "persist", "append", "resize"])
def test_one_flush_is_enough(kind: str, path: Path) -> None:
    """What is durable already costs no flush again: the catalogue is left alone."""
    log = path.with_name("log")
    command = ["strace", "-f", "-y", "-o", str(log), "-e", "trace=fsync,fdatasync,msync,syncfs"]
    done = subprocess.run(
        [*command, sys.executable, "-c", FLUSHES, str(path), kind],
        env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line for line in log.read_text().splitlines() if "<" in line]
    flushed = [line.split("<")[1].split(">")[0] for line in lines]
    last = flushed[-20:]
    assert len(set(last)) == 1, last
    assert last[0].startswith(f"{path}.regions/"), last
    assert flushed.count(last[0]) <= 20 + 2  # and what was done before


# Times


TIMES = """
import json, os, signal, sys
from warabi.target import opening as layout
from warabi.target.config import FileConfig
target = layout.open_file(FileConfig(path=sys.argv[1], create_if_missing=True))
space, past, future = target.namespace, 10**9, 1 << 62

def utime(region, when):
    space.setattr(region.slot, mtime_ns=when)

def write(region, data=b"x"):
    target.write(region, 0, data)

told = {}
def promise(name, region):
    target.fsync(region)
    found = target.stat(region)
    told[name] = region.hex(), found.mtime_ns, found.ctime_ns

regions = {name: target.create_and_write(bytes(9000), persist=True) for name in (
    "written", "again", "past", "past, written", "written, past", "future", "future, written",
    "mode", "resized", "grown", "replaced", "linked")}
for name, region in regions.items():
    steps = {
        "past": [lambda: utime(region, past)],
        "past, written": [lambda: utime(region, past), lambda: write(region)],
        "written, past": [lambda: write(region), lambda: utime(region, past)],
        "future": [lambda: utime(region, future)],
        "future, written": [lambda: utime(region, future), lambda: write(region)],
        "mode": [lambda: write(region), lambda: space.setattr(region.slot, mode=0o600)],
        "resized": [lambda: target.resize(region, 100)],
        "grown": [lambda: target.write(region, 9000, b"x", extend=True)],
        "linked": [lambda: write(region), lambda: space.link_name(region, "/linked")],
    }.get(name, [lambda: write(region)])
    for step in steps:  # what is promised after one step must not outlive the next
        step()
        promise(name, region)
    if name == "again":
        for _ in range(50):
            write(region)
            promise(name, region)
    if name == "replaced":
        target._storage.replace(region, 9000)
print(json.dumps(told))
sys.stdout.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def told_times(target: Target, told: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """As ``TIMES`` tells them."""
    found = {}
    for name, (region, _, _) in told.items():
        stat = target.stat(RegionID(bytes.fromhex(region)))
        found[name] = [region, stat.mtime_ns, stat.ctime_ns]
    return found


def test_times_that_were_synced_survive(path: Path) -> None:
    """Exactly, whatever they are, and also when the next process is killed or closes in order."""
    done = run_python(TIMES, str(path))
    assert done.returncode == -signal.SIGKILL, done.stderr
    told = json.loads(done.stdout)
    assert len(told) == 12
    recover = """
import os, signal, sys
from warabi.target import opening as layout
from warabi.target.config import FileConfig
target = layout.open_file(FileConfig(path=sys.argv[1]))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run_python(recover, str(path)).returncode == -signal.SIGKILL
    for _ in range(2):
        with existing(path) as target:
            assert told_times(target, told) == told


def test_times_that_were_set_after_a_sync_are_those_that_count(path: Path) -> None:
    """Neither a crash nor the file brings back older ones."""
    with open_target(path) as target:
        region = target.create_and_write(bytes(100), persist=True)
        for number in range(20):
            target.write(region, 0, b"%d" % number)
            target.fsync(region)
    script = """
import os, signal, sys
from warabi.target import opening as layout
from warabi.target.config import FileConfig
target = layout.open_file(FileConfig(path=sys.argv[1]))
(region,) = target.list()
target.write(region, 0, b"x")
target.fsync(region)
target.namespace.setattr(region.slot, mtime_ns=5)
target.commit()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run_python(script, str(path)).returncode == -signal.SIGKILL
    with existing(path) as target:
        assert target.stat(region).mtime_ns == 5


def test_a_file_system_without_extended_attributes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times are committed there."""
    calls = []

    def refuse(*args: Any) -> None:
        calls.append(args)
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(xattr_times, "put", refuse)
    with open_target(path) as target:
        region = target.create_and_write(bytes(5000), persist=True)
        for number in range(3):
            target.write(region, 0, b"x")
            target.fsync(region)
            copy = path.parent.with_name(f"copy{number}")  # as a crash leaves it
            shutil.copytree(path.parent, copy)
            told = target.stat(region)
            with existing(copy / path.name) as left:
                assert left.stat(region) == told
    assert len(calls) == 1


# Where the file system puts them


def test_regions_are_spread_over_the_block_groups_of_ext4(tmp_path: Path) -> None:
    """Elsewhere they are where they are, which the other tests show."""
    image, place = tmp_path / "disk", tmp_path / "mounted"
    image.touch()
    os.truncate(image, 64 << 20)
    place.mkdir()
    tools = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    groups, inodes = 8, 1024
    shape = ["-b", "1024", "-N", str(groups * inodes), "-O", "^flex_bg"]  # groups of 8 MiB
    command = ["mkfs.ext4", "-q", "-F", *shape, str(image)]
    subprocess.run(command, check=True, env=tools, timeout=PATIENCE)
    subprocess.run(["mount", "-o", "loop", image, place], check=True, timeout=PATIENCE)
    try:
        with open_target(place / "target", packed=False) as target:
            for _ in range(100):
                target.create(1)
        files = place.glob("target.regions/*/*")
        found = {(file.stat().st_ino - 1) // inodes for file in files}
        assert len(found) > groups // 2
        shutil.rmtree(place / "target.regions")
    finally:
        subprocess.run(["umount", "-l", place], check=True, timeout=PATIENCE)
