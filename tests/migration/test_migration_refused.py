"""Migrations that are refused, and those that are asked for from elsewhere."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.helpers import (
    MEMORY,
    PATIENCE,
    environment,
    eventually,
    file_config,
    pattern,
    provider_process,
)
from tests.support.migrations import (
    contents,
    fill,
    handle,
    leftovers,
    merge,
)
from tests.tools.test_cli import on_terminal
from warabi import errors
from warabi.client import TargetHandle
from warabi.engine import Engine
from warabi.server import Provider
from warabi.tools.migrate import ask

# What is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"new_rood": "/x"}, r"\$\.new_rood: unknown key"),
        ({"new_root": 5}, r"\$\.new_root: .*string"),
        ({"new_root": ""}, r"\$\.new_root: "),
        ({"transfer_size": -1}, r"\$\.transfer_size: "),
        ({"transfer_size": True}, r"\$\.transfer_size: .*integer"),
        ({"remove_source": 1}, r"\$\.remove_source: .*boolean"),
        ({"merge_config": []}, r"\$\.merge_config: "),
        ({"merge_config": {"target": 7}}, r"\$\.merge_config\.target: expected an object"),
        ({"merge_config": {"tarGet": {}}}, r"\$\.merge_config\.tarGet: unknown key"),
        ({"merge_config": {"target": {}, "x": 1}}, r"\$\.merge_config\.x: unknown key"),
        ({"merge_config": {"target": {"type": "tape"}}}, r"\$\.merge_config\.target\.type: 'tape'"),
        ({"merge_config": {"type": "tape"}}, r"\$\.merge_config\.type: 'tape'"),
        (
            {"merge_config": {"target": {"config": {"sync": "yes"}}}},
            r"\$\.merge_config\.target\.config\.sync: ",
        ),
        ({"merge_config": {"config": {"siink": 1}}}, r"\$\.merge_config\.config\.siink: unknown"),
        (
            {"merge_config": {"config": {"override_if_exists": True}}},
            r"\$\.merge_config\.config\.override_if_exists: .*never replaces",
        ),
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
    ],
)
def test_options_are_checked(
    moving: tuple[Provider, Provider, TargetHandle], options: Any, words: str
) -> None:
    source, destination, target = moving
    with pytest.raises(errors.ConfigError, match=f"^migration options: .*{words}"):
        source.migrate_target(str(source._engine.addr()), 2, options)
    assert "target" not in destination.get_config()
    target.create(1)


def test_memory_to_files_needs_a_path(engine: Engine) -> None:
    source, _ = Provider(engine, 1, MEMORY), Provider(engine, 2, {})
    with pytest.raises(errors.ConfigError, match=r"\$\.new_root: required key is missing"):
        source.migrate_target(str(engine.addr()), 2, {"merge_config": merge("file")})


def test_destinations_that_cannot_be(
    engine: Engine, moving: tuple[Provider, Provider, TargetHandle], tmp_path: Path
) -> None:
    source, _, target = moving
    address = str(engine.addr())
    expected = contents(target)
    taken = Provider(engine, 3, file_config(tmp_path / "taken"))
    (tmp_path / "text").write_text("something else" * 100)
    free = {"new_root": str(tmp_path / "free")}
    cases: list[tuple[type[errors.Exception], str, str, int, dict[str, Any]]] = [
        (errors.ConfigError, "provider 3 already has a target", address, 3, free),
        (errors.ConfigError, "provider 1 already has a target", address, 1, free),
        (errors.ConfigError, "expected 0 to 65535", address, 65536, free),
        (errors.ConfigError, "unknown transport", "carrier+pigeon://x", 2, free),
        (errors.ProviderNotFound, "no provider 77", address, 77, free),
        (errors.ConnectionFailed, "no such engine", "na+sm://1-999", 2, free),
        (errors.ConnectionFailed, "refused", "tcp://127.0.0.1:1", 2, free),
        (errors.ConfigError, "never replaces", address, 2, {"new_root": str(tmp_path / "taken")}),
        (errors.ConfigError, "never replaces", address, 2, {}),  # its own path
        (errors.ConfigError, "not a warabi target", address, 2,
         {"new_root": str(tmp_path / "text")}),
        (errors.ConfigError, "not a directory", address, 2,
         {"new_root": str(tmp_path / "text" / "below")}),
        (errors.StorageFull, "exceed the 1000 bytes", address, 2,
         {"merge_config": {"type": "memory", "config": {"capacity": 1000}}}),
    ]  # fmt: skip
    for kind, words, where, provider_id, options in cases:
        with pytest.raises(kind, match=words):
            source.migrate_target(where, provider_id, options)
    assert not (tmp_path / "free").exists()
    assert (tmp_path / "text").read_text() == "something else" * 100
    assert contents(target) == expected
    assert taken
    source.migrate_target(address, 2, free)
    assert contents(handle(engine, address, 2)) == expected


def test_nothing_to_migrate(engine: Engine) -> None:
    source, _ = Provider(engine, 1, {}), Provider(engine, 2, {})
    with pytest.raises(errors.TargetNotFound, match="provider 1 has no target"):
        source.migrate_target(str(engine.addr()), 2)


@pytest.fixture
def small_medium(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", place], check=True, timeout=30)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True, timeout=30)


@pytest.mark.parametrize("kind", ["file", "pmem"])
def test_a_full_disk_fails_the_call(
    engine: Engine, tmp_path: Path, small_medium: Path, kind: str
) -> None:
    source, destination = Provider(engine, 1, MEMORY), Provider(engine, 2, {})
    address = str(engine.addr())
    target = handle(engine, address, 1)
    for i in range(5):
        target.create_and_write(pattern(1_000_000, i))
    expected = contents(target)
    options = {"new_root": f"{small_medium}/a/b/target", "merge_config": merge(kind)}
    with pytest.raises(errors.StorageFull):
        source.migrate_target(address, 2, options)
    assert leftovers(small_medium) == []
    assert contents(target) == expected
    target.create(1)
    expected = contents(target)
    assert "target" not in destination.get_config()
    source.migrate_target(address, 2, options | {"new_root": str(tmp_path / "roomy")})
    assert contents(handle(engine, address, 2)) == expected


# Who may


def test_network_peers_need_permission(tmp_path: Path, client_engine: Engine) -> None:
    root = tmp_path / "root"
    may: list[dict[str, Any]] = [
        {},
        {"migration": {"receive": True}},
        {"migration": {"receive": True, "root": str(root)}},
    ]
    (tmp_path / "link").symlink_to(tmp_path)
    with (
        provider_process("ofi+tcp", MEMORY, MEMORY | {"migration": {"send": True}}) as source,
        provider_process("ofi+tcp", *may) as destination,
    ):
        target = handle(client_engine, source.address, 2)
        fill(target)
        expected = contents(target)

        def go(provider_id: int, receiver: int, **options: Any) -> None:
            where = (source.address, provider_id), (destination.address, receiver)
            ask(client_engine, *where, options)

        with pytest.raises(
            errors.PermissionDenied, match=r"\$\.migration\.send in its configuration"
        ):
            go(1, 3)
        with pytest.raises(
            errors.PermissionDenied, match=r"\$\.migration\.receive in its configuration"
        ):
            go(2, 1)
        files = {"merge_config": merge("file")}
        with pytest.raises(errors.PermissionDenied, match="may give a path only if"):
            go(2, 2, new_root=str(tmp_path / "anywhere"), **files)
        for path in ("../outside", str(tmp_path / "outside"), f"{tmp_path}/link/outside", "."):
            with pytest.raises(errors.PermissionDenied, match="is not inside"):
                go(2, 3, new_root=path, merge_config={"type": "file", "config": {"path": path}})
        assert leftovers(tmp_path) == ["link"]
        go(2, 3, new_root="inside/target", **files)
        assert contents(handle(client_engine, destination.address, 3)) == expected
        assert (root / "inside" / "target").is_file()


def test_memory_may_come_over_the_network(client_engine: Engine) -> None:
    may = {"migration": {"receive": True}}
    with provider_process("ofi+tcp", may) as destination, Engine("na+sm") as engine:
        source = Provider(engine, 1, MEMORY)
        target = handle(engine, str(engine.addr()), 1)
        fill(target)
        expected = contents(target)
        source.migrate_target(destination.address, 1)
        assert contents(handle(client_engine, destination.address, 1)) == expected


# The command line


def warabi(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from warabi.tools.cli.main import main; main()", *arguments],
        env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip


def test_command_line(tmp_path: Path, client_engine: Engine) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    with (
        provider_process("na+sm", file_config(here)) as source,
        provider_process("na+sm", {}, {}) as destination,
    ):
        target = handle(client_engine, source.address, 1)
        fill(target)
        expected = contents(target)
        where = ("migrate", source.address, "1", destination.address)
        done = warabi(*where, "2", "--merge-config", "{")
        assert done.returncode == 2
        assert "not valid JSON" in done.stderr
        done = warabi(*where, "99999")
        assert done.returncode == 2
        done = warabi(*where, "7")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("warabi: no provider 7 at ")
        assert done.stderr.count("\n") == 1
        pmem = '{"target": {"type": "pmem"}}'
        options = ["--new-root", str(there), "--transfer-size", "5000", "--merge-config", pmem]
        done = warabi(*where, "2", *options, "--keep-source")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert contents(handle(client_engine, destination.address, 2)) == expected
        assert here.exists()
        done = warabi(*where, "1")
        assert done.returncode == 1
        assert "was migrated to provider 2" in done.stderr


def test_progress_is_shown_on_a_terminal(client_engine: Engine) -> None:
    with (
        provider_process("na+sm", MEMORY) as source,
        provider_process("na+sm", {}) as destination,
    ):
        fill(handle(client_engine, source.address, 1))
        shown = on_terminal(80, "migrate", source.address, "1", destination.address, "1")
        assert b"migrate" in shown


def test_a_migration_continues_when_the_requester_leaves(
    tmp_path: Path, client_engine: Engine
) -> None:
    """A command that is killed leaves its migration to go on."""
    with (
        provider_process("na+sm", MEMORY) as source,
        provider_process("na+sm", {}) as destination,
    ):
        target = handle(client_engine, source.address, 1)
        target.create_and_write(pattern(3_000_000))
        expected = contents(target)
        destination.stop()
        before = source.descriptors()
        arguments = [source.address, "1", destination.address, "1"]
        with subprocess.Popen(
            [
                sys.executable, "-c", "from warabi.tools.cli.main import main; main()", "migrate",
                *arguments,
            ],
            env=environment(), stderr=subprocess.DEVNULL,
        ) as command:  # fmt: skip
            # The asker's connection, and the one to the destination: it is under way.
            eventually(lambda: source.descriptors() >= before + 2)
            command.kill()
        destination.signal(signal.SIGCONT)
        there = handle(client_engine, destination.address, 1)

        def arrived() -> bool:
            with contextlib.suppress(errors.TargetNotFound):
                return contents(there) == expected
            return False

        eventually(arrived)
