"""A workload for strace: ``recorded.py BACKEND PATH SEED OPERATIONS``.

Prints a line before and after each step, with the ID of a new region, or the times that an
``fsync`` promises.  Whoever runs the same operations of the same seed
against an oracle knows what each line promised.
"""

from __future__ import annotations

import os
import random
import sys

from tests.crash.oracle import Oracle
from tests.crash.targets import opened
from tests.crash.workload import REGION_KINDS, TrioSurface, next_op, on_target, promised_times
from warabi.target import commit


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def main() -> None:
    backend, path, seed, operations = sys.argv[1:]
    vars(commit)["COMMIT_INTERVAL"] = 0.01  # so that regular commits come between everything else
    rng = random.Random(int(seed))
    oracle = Oracle()
    say("opening")
    target = opened(backend, path)
    say("open")
    surface = TrioSurface(target) if backend == "trio" else on_target(target)
    for number in range(int(operations)):
        op = next_op(rng, oracle, REGION_KINDS)
        region = oracle.regions.get(op.key)
        oracle.begin(op)
        say(f"begin {number}")
        rid = surface.run(op, region.rid if region else None)
        times = promised_times(op, surface, region.rid if region else None)
        oracle.end(op, rid, times)
        told = rid.hex() if rid else f"{times.mtime} {times.ctime}" if times else ""
        say(f"end {number} {told}")
    say("closing")
    target.close()
    say("closed")


if __name__ == "__main__":
    main()
