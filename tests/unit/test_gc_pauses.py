"""Pauses of the garbage collector with many objects are bounded."""

from __future__ import annotations

import subprocess
import sys

from tests.support.helpers import run_python

SCRIPT = """
import gc, sys, weakref
from warabi.eventloop import gc_pauses

class Object:
    __slots__ = ("__weakref__", "other")

def cycle():
    one = Object()
    one.other = one
    return weakref.ref(one)

gc.collect()
gc_pauses.GC_HOLD = float(sys.argv[1])
gc_pauses.limit_pauses()
gc_pauses.limit_pauses()
kept = [Object() for _ in range(1_000_000)]
gc.collect()
before = gc.get_freeze_count()
visited = len(gc.get_objects())
found = cycle()
gc.collect(0)
assert found() is None, "what is new is still collected"
del kept
print(len(gc.callbacks), before, visited, gc.get_freeze_count())
"""


def result(long: float) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(long)], capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    return [int(word) for word in done.stdout.split()]


def test_what_survives_a_long_collection_is_not_visited_again() -> None:
    callbacks, frozen, visited, left = result(0)
    assert callbacks == 1
    assert frozen > 900_000
    assert visited < 100_000
    assert left < 100_000  # they are freed with their last references


def test_what_survives_a_short_collection_is() -> None:
    _, frozen, visited, _ = result(1000)
    assert frozen == 0
    assert visited > 1_000_000


IDLE = """
import gc
from warabi.eventloop import gc_pauses

collections = []
gc.disable()
gc.callbacks.append(lambda phase, info: collections.append(info["generation"]))
gc_pauses.collect_while_idle()
print(len(collections))
gc_pauses.limit_pauses()
gc_pauses.collect_while_idle()
print(*collections)
"""


def test_a_full_collection_while_idle_is_only_for_processes_that_serve() -> None:
    assert run_python(IDLE).stdout.split() == ["0", "2", "2"]  # its start and its end
