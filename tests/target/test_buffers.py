"""``bytes`` objects that are filled in place."""

from __future__ import annotations

import subprocess
import sys

from tests.support.helpers import PATIENCE, environment
from warabi._core import buffers


def test_bytes_are_filled() -> None:
    def fill(view: memoryview) -> None:
        assert bytes(view) == bytes(len(view))
        view[:] = b"x" * len(view)

    for size in (0, 1, 100_000):
        filled = buffers.filled_bytes(size, fill)
        assert type(filled) is bytes
        assert filled == b"x" * size


ABANDONED = """
import gc
from warabi._core import buffers

def fill(view):
    part = view[100:]
    raise ValueError

def failed():
    try:
        buffers.filled_bytes(1000, fill)
    except ValueError as error:
        kept = error  # a cycle: its traceback has this frame, and that of fill

gc.disable()
failed()
assert gc.collect()
"""


def test_what_a_failure_left_unfilled_is_collected_in_silence() -> None:
    """Where parts of the view are in a cycle."""
    nothing_is_said_by(ABANDONED)


CANCELLED = """
import gc
import trio
import warabi.aio
from warabi.in_process.aio_link import AsyncDirectLink
from tests.support.helpers import open_memory
from warabi.target.config import MemoryConfig

class Waiting(AsyncDirectLink):
    async def read_into(self, region, offset, place):
        part = place[100:]
        await trio.sleep_forever()

async def main():
    with open_memory(MemoryConfig()) as opened, trio.move_on_after(0.01):
        target = warabi.aio.Target(Waiting(opened))
        region = await target.create(1000)
        try:
            await target.read(region, 0, 1000)
        except trio.Cancelled as error:
            kept = error  # a cycle
            raise

gc.disable()
trio.run(main)
assert gc.collect()
"""


def test_what_a_cancelled_read_left_unfilled_is_collected_in_silence() -> None:
    nothing_is_said_by(CANCELLED)


def nothing_is_said_by(script: str) -> None:
    """It ends well and prints no error, nor what a finalizer raised."""
    # Before 3.13 Python only tells in development mode what a finalizer of io raised.
    command = [sys.executable, "-X", "dev", "-c", script]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, check=False, env=environment()
    )
    assert (ended.returncode, ended.stderr) == (0, "")
