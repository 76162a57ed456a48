"""``warabi stats``, and what ``warabi serve`` logs of itself."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path

import pytest

from tests.mount.conftest import place
from tests.mount.support import mounting
from tests.support.helpers import MEMORY, PATIENCE, provider_process
from tests.tools.test_cli import fails, ok, on_terminal, serving
from warabi._core.units import shown_bytes, shown_seconds
from warabi.client import Client
from warabi.engine import Engine, client

__all__ = ["place"]


def test_the_counters_of_a_provider() -> None:
    with provider_process("na+sm", MEMORY, MEMORY) as served:
        with Engine("na+sm", client) as engine:
            target = Client(engine).make_target_handle(served.address, 2)
            target.create_and_write(bytes(5000))
            with pytest.raises(FileNotFoundError):
                target.open_name("/no\x1b[31m")
        lines = ok("stats", served.address, "-p2").decode().splitlines()
        assert lines[0].startswith(f"engine {served.address}: version ")
        assert lines[3] == "provider 2: memory"
        assert lines[5].startswith("  regions: 1, 4.88 KiB; ")
        table = {line.split()[0]: line.split() for line in lines[6:]}
        assert table["operation"] == "operation count errors bytes mean median 99 %".split()
        assert table["create_and_write"][1:5] == ["1", "0", "4.88", "KiB"]
        assert table["open_name"][1:3] == ["1", "1"]
        report = json.loads(ok("stats", "--json", served.address, "-p1"))
        assert report["targets"][0]["operations"] == {}
        assert report["provider_ids"] == [1, 2]


def test_they_fit_a_narrow_terminal() -> None:
    with provider_process("na+sm", MEMORY) as served:
        with Engine("na+sm", client) as engine:
            Client(engine).make_target_handle(served.address, 1).create_and_write(b"data")
        lines = on_terminal(40, "stats", served.address, "-p1").decode().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("  operation"))
    assert len(lines) > start + 1
    assert max(map(len, lines[start:])) <= 40


def test_the_counters_of_a_mount(place: Path) -> None:
    with mounting("memory:", place) as mount:
        (mount.path / "directory").mkdir()
        (mount.path / "directory" / "file").write_bytes(bytes(10))
        for path in (mount.path, mount.path / "directory" / "file", mount.path / ".stats"):
            lines = ok("stats", path).decode().splitlines()
            assert lines[0].startswith(f"mount {mount.path}: version ")
            assert lines[1] == "  source memory:, front end kernel"
            assert any(line.split()[:2] == ["mkdir", "1"] for line in lines)
        assert json.loads(ok("stats", "--json", mount.path))["mountpoint"] == str(mount.path)


def test_what_has_no_counters(tmp_path: Path) -> None:
    assert "is on no mount of warabifs" in fails("stats", tmp_path)
    assert fails("stats", tmp_path / "none").startswith(
        f"warabi: {tmp_path}/none: does not exist, and is neither a target nor on a mount of one"
    )
    assert "no engine" in fails("stats", "na+sm://1-0") or "connect" in fails(
        "stats", "na+sm://1-0"
    )
    assert "WARABI_ADDRESS" in fails("stats")


def test_serve_logs_its_state_as_json() -> None:
    with serving("-t", "memory:", "--log-format", "json") as service:
        address = service.address
        timer = threading.Timer(PATIENCE, service.process.kill)
        timer.start()
        try:
            service.process.send_signal(signal.SIGUSR1)
            messages: list[str] = []
            assert service.process.stderr is not None
            while "state: }" not in messages:
                line = service.process.stderr.readline()
                assert line, messages
                record = json.loads(line)
                assert record["pid"] == service.process.pid
                messages.append(record["message"])
        finally:
            timer.cancel()
            timer.join()
        assert ok("ls", address) == b""  # it serves on
        service.end()
    text = "\n".join(messages)
    assert "state: thread MainThread:" in text
    assert "state: thread warabi-engine:" in text
    assert "ProviderLoop._accept (loop.py:" in text
    start = messages.index("state: {")
    report = json.loads("".join(message.removeprefix("state: ") for message in messages[start:]))
    assert report["address"] == address


def test_numbers_for_people() -> None:
    sizes = [0, 999, 1000, 1023_000, 1024**2, 999.6 * 1024**2, 1024**7]
    assert [shown_bytes(size) for size in sizes] == [
        "0 B", "999 B", "0.98 KiB", "999 KiB", "1.00 MiB", "0.98 GiB", "1024 EiB",
    ]  # fmt: skip
    durations = [0, 1e-6, 0.0123, 119.9, 120, 7260, 90000]
    assert [shown_seconds(duration) for duration in durations] == [
        "0.00 µs", "1.00 µs", "12.3 ms", "120 s", "2 min", "2 h 1 min", "1 d 1 h",
    ]  # fmt: skip
