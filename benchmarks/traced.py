"""Calls the API under strace: ``python -m benchmarks.traced BACKEND DIRECTORY [ADDRESS ID]``.

Without an address, the target is in this process.  Says that it is ready, waits for a line on its
standard input, and does each operation :func:`times` times, marking where it begins.  Some are done
again, :data:`RESTED`, with so much time before each that the provider sleeps by then.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.rows import KIB, MIB, copies, outstanding
from benchmarks.steady import steady
from benchmarks.strace import mark
from benchmarks.subjects import MEMORY, file_config
from warabi.client import Client, RegionID, TargetHandle
from warabi.engine import Engine, client
from warabi.server import Provider

_OUTSTANDING = "64 outstanding writes"
RESTED = " after a rest"
"""The end of the names of operations that are requested from a blocked process."""
_REST = 0.002
"""Seconds; busy polling for the next message ends earlier."""
Call = Callable[[], object]


def times(name: str) -> int:
    """How often the operation *name* is done."""
    return 8 if name == _OUTSTANDING else 64


def operations(target: TargetHandle) -> Iterator[tuple[str, Call]]:
    """Names and calls, in an order in which they can be made."""
    made: list[RegionID] = []

    def create() -> None:
        made.append(target.create(4 * KIB))

    yield "create", create
    yield "create_and_write 64 B", lambda: made.append(target.create_and_write(b"c" * 64))
    yield "erase", lambda: target.erase(made.pop())
    for size in (64, 4 * KIB, 64 * KIB, MIB):
        for row in copies(size):
            yield row.name, row.make(target).call
    region = target.create_and_write(b"p" * 4 * KIB, persist=True)

    def persist() -> None:
        target.write(region, 0, b"d" * 4 * KIB)
        target.persist(region, 0, 4 * KIB)

    yield "write and persist 4 KiB", persist
    yield _OUTSTANDING, outstanding(4 * KIB, 64, target).call
    yield f"create{RESTED}", create
    for row in copies(64):
        yield f"{row.name}{RESTED}", row.make(target).call


@contextlib.contextmanager
def _target() -> Iterator[TargetHandle]:
    backend, directory, *where = sys.argv[1:]
    if where:
        mode = where[0].partition(":")[0]
        with Engine("na+sm" if mode == "na+sm" else "tcp", client) as engine:
            yield Client(engine).make_target_handle(where[0], int(where[1]))
        return
    config = MEMORY if backend == "memory" else file_config(Path(directory, "traced"))
    with Engine("na+sm") as engine, Provider(engine, 1, config):
        yield Client(engine).make_target_handle(str(engine.addr()), 1)


def main() -> None:
    steady()
    with _target() as target:
        calls = list(operations(target))
        print("ready", flush=True)
        sys.stdin.readline()
        for name, call in calls:
            os.access(mark(name), os.F_OK)
            for _ in range(times(name)):
                if name.endswith(RESTED):
                    time.sleep(_REST)
                call()
            os.access(mark(""), os.F_OK)
        print("done", flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    main()
