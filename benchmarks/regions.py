"""Cost of many regions: ``python -m benchmarks.regions BACKEND COUNT SIZE [DIRECTORY]``.

Runs as a separate process, so that its memory is that of the regions.  Prints JSON: microseconds to
create one and to read one at random, bytes of memory for each, and seconds to reopen the target.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.stats import Work, measure
from benchmarks.subjects import MEMORY, file_config
from benchmarks.usage import memory
from warabi.client import Client
from warabi.engine import Engine
from warabi.server import Provider


def _fill(engine: Engine, config: dict[str, Any], count: int, size: int) -> dict[str, float]:
    with Provider(engine, 1, config):
        target = Client(engine).make_target_handle(str(engine.addr()), 1)
        data, place = b"r" * size, bytearray(size)
        before = memory(os.getpid())
        start = time.perf_counter()
        if config is MEMORY:
            for _ in range(count):
                target.create_and_write(data)
        else:  # holes: what is measured is the number, not the disk
            for _ in range(count):
                target.create(size)
        created = (time.perf_counter() - start) / count * 1e6
        used = memory(os.getpid()) - before
        some = random.Random(count).sample(list(target.list()), min(count, 10_000))
        at_random = iter(some * 1000)
        read = measure(Work(lambda: target.read_into(next(at_random), 0, place)), 0.5)
        return {"create": created, "read": read.value, "p99": read.p99, "memory": used / count}


def main() -> None:
    backend, count, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    config = MEMORY if backend == "memory" else file_config(Path(sys.argv[4], "target"))
    with Engine("na+sm") as engine:
        found = _fill(engine, config, count, size)
        if config is not MEMORY:
            start = time.perf_counter()
            with Provider(engine, 2, config):
                found["open"] = time.perf_counter() - start
    print(json.dumps(found))


if __name__ == "__main__":
    main()
