"""Two hundred clients at once, some of which are killed in the middle of something."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.helpers import (
    MEMORY,
    PATIENCE,
    ROOT,
    Served,
    environment,
    eventually,
    file_config,
    memories,
    provider_process,
)
from warabi.client import Client
from warabi.engine import Engine, client

CLIENTS = 200
PROCESSES = 8
KILLED = 3
SECONDS = 2.0
"""For which those that live go on."""

WORK = """
import random, sys, threading
from warabi.client import Client
from warabi.engine import Engine, Mode

address, seed, count, share = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True"
stop = threading.Event()

def work(number):
    numbers = random.Random(number)
    with Engine(address.split("://")[0], Mode.CLIENT, config={"share": share}) as engine:
        handle = Client(engine).make_target_handle(address, 1)
        mine = {}
        while not stop.is_set():
            size = numbers.choice([0, 10, 2048, 2049, 70_000, 300_000])
            data = numbers.randbytes(16) * (size // 16 + 1)
            data = data[:size]
            region = handle.create_and_write(data)
            mine[region] = data
            handle.write_async(region, size // 2, data[size // 2 :])  # dropped
            handle.write(region, 0, data)
            for each, expected in mine.items():
                assert handle.read(each, 0, len(expected)) == expected
            if len(mine) > 3:
                gone = next(iter(mine))
                handle.erase(gone)
                del mine[gone]
        for region, expected in mine.items():
            assert handle.read(region, 0, len(expected)) == expected
            handle.erase(region)

failures = []
def guarded(number):
    try:
        work(number)
    except BaseException as error:
        failures.append(error)

threads = [threading.Thread(target=guarded, args=(seed * 1000 + i,)) for i in range(count)]
print("ready", flush=True)
for thread in threads: thread.start()
sys.stdin.readline()
stop.set()
for thread in threads: thread.join()
for failure in failures[:1]: raise failure
"""


@pytest.fixture(params=["na+sm memory", "na+sm file", "tcp memory"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    transport, kind = request.param.split()
    config = MEMORY if kind == "memory" else file_config(tmp_path / "target")
    with provider_process(transport, config) as served:
        yield served


def private_memory(served: Served) -> int:
    status = Path(f"/proc/{served.process.pid}/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def test_memory_descriptors_and_answers_stay_right(served: Served) -> None:
    share = served.address.startswith("na+sm")
    with Engine(served.address.split("://")[0], client) as engine:
        handle = Client(engine).make_target_handle(served.address, 1)
        kept = handle.create_and_write(b"kept" * 1000)
        handle.read(kept, 0, 4)
        before = served.descriptors(), private_memory(served)
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", WORK, served.address, str(seed),
                 str(CLIENTS // PROCESSES), str(share and seed % 2 == 0)],
                env=environment(), cwd=ROOT, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )
            for seed in range(PROCESSES)
        ]  # fmt: skip
        try:
            for process in processes:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            victims = random.Random(1).sample(processes, KILLED)
            for victim in victims:
                handle.read(kept, 0, 4)  # some time, in which it gets into its work
                os.kill(victim.pid, signal.SIGKILL)
            time.sleep(SECONDS)
            for process in processes:
                assert process.stdin is not None
                process.stdin.close()
                process.stdin = None
            for process in processes:
                expected = -signal.SIGKILL if process in victims else 0
                assert process.wait(PATIENCE) == expected
        finally:
            for process in processes:
                process.kill()
                process.communicate()
        # What killed clients had made is there, whole, and can be erased by others.
        for region in list(handle.list()):
            if region != kept:
                assert len(handle.read(region, 0, handle.size(region))) == handle.size(region)
                handle.erase(region)
        assert handle.read(kept, 0, 4000) == b"kept" * 1000
        # Segments of small regions, open files of erased ones and memory for the next ones may
        # stay, connections may not.
        pid = served.process.pid
        eventually(lambda: served.descriptors() <= before[0] + 30 + len(memories(pid)))
        assert len(memories(pid)) <= 128
        assert private_memory(served) - before[1] < 64 << 20
