"""Writes of files that an event loop makes itself, for as long as the kernel takes them at once."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tests.support.helpers import file_config, pattern
from warabi._core import fileio
from warabi.backends import file
from warabi.client import Client
from warabi.engine import Engine, client
from warabi.server import Provider
from warabi.target.write_throttle import Pace

MS = 1_000_000


def test_a_fast_write_does_not_start_throttling() -> None:
    pace = Pace()
    pace.wrote(4096, 0, 4 * MS)
    pace.wrote(16 << 20, 0, 80 * MS)  # so many bytes take a while to copy
    assert not pace.slow(4 * MS)


def test_after_a_slow_write_there_is_a_pause_and_a_longer_one_if_it_happens_again() -> None:
    pace, now, pauses = Pace(), 0, []
    for _ in range(10):
        pace.wrote(1, now, now + 6 * MS)
        began = now = now + 6 * MS
        while pace.slow(now):
            now += MS
        pauses.append((now - began) // MS)
    assert pauses == [50, 100, 200, 400, 800, 1600, 3200, 3200, 3200, 3200]


def test_pauses_are_short_again_when_writes_were_quick_for_long() -> None:
    pace = Pace()
    pace.wrote(1, 0, 6 * MS)
    pace.wrote(1, 200 * MS, 206 * MS)
    assert pace.slow(255 * MS)
    assert not pace.slow(256 * MS)


@pytest.mark.parametrize("size", [64, 3000, 200_000])
def test_on_a_slow_disk_threads_write(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of small writes, such as come whole, and such as are received piece by piece."""
    threads: list[int] = []
    real = fileio.pwrite_full

    def held_up(fd: int, data: memoryview, offset: int) -> None:
        threads.append(threading.get_ident())
        time.sleep(0.03)
        real(fd, data, offset)

    with (
        Engine("tcp") as engine,
        Provider(engine, 1, file_config(tmp_path / "target")),
        Engine("tcp", client) as calling,
    ):
        handle = Client(calling).make_target_handle(str(engine.addr()), 1)
        region = handle.create(size)
        monkeypatch.setattr(file, "pwrite_full", held_up)
        for number in range(12):
            data = pattern(size + number)[number:]
            handle.write(region, 0, data)
            assert handle.read(region, 0, size) == data
        monkeypatch.undo()
    assert any(thread != threads[0] for thread in threads)
