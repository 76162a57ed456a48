"""Measures start-up time, and processor use while idle."""

from __future__ import annotations

import sys
import time

from benchmarks.api import Progress
from benchmarks.processes import line_of, provider, run, running
from benchmarks.stats import Round, Series
from benchmarks.subjects import MEMORY
from benchmarks.usage import cpu_seconds, resident

IMPORTS = (
    "warabi",
    "mochi.warabi.client",
    "warabi.client",
    "warabi.server",
    "warabi.aio",
    "warabifs.mount.main",
)
READY = "Engine and Provider ready"
LIMITS = {"import warabi": 150_000.0, "import mochi.warabi.client": 60_000.0, READY: 50_000.0}
"""Goals, in microseconds."""

_IMPORT = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
_READY = """
import time
from warabi.engine import Engine
from warabi.server import Provider
start = time.perf_counter()
with Engine("na+sm") as engine, Provider(engine, 1, {"target": {"type": "memory"}}):
    print(time.perf_counter() - start)
"""
_IDLE = """
import sys
from warabi.client import Client
from warabi.engine import Engine, client
with Engine("na+sm", client) as engine:
    target = Client(engine).make_target_handle(sys.argv[1], 1)
    target.create_and_write(b"idle")
    print("ready", flush=True)
    sys.stdin.readline()
"""


def startup(rounds: int, say: Progress) -> list[Series]:
    """Times of imports, and from ``Engine()`` to a provider that serves; each in a new process."""
    say("startup")
    programs = {f"import {name}": _IMPORT.format(name) for name in IMPORTS}
    programs[READY] = _READY
    series = {name: Series(name, "warabi") for name in programs}
    for number in range(rounds + 1):
        for name, program in programs.items():
            took = float(run(sys.executable, "-c", program))
            if number:  # the first one reads from the disk
                series[name].rounds.append(Round(took * 1e6))
    return list(series.values())


def idle(say: Progress, seconds: float = 3.0) -> dict[str, float]:
    """Processor seconds for a second, and bytes of memory, of a provider and a client at rest."""
    say("idle processes")
    with (
        provider("na+sm", [MEMORY]) as (address, server),
        running([sys.executable, "-c", _IDLE, address]) as client,
    ):
        line_of(client)
        time.sleep(0.5)
        before = [cpu_seconds([process.pid]) for process in (server, client)]
        time.sleep(seconds)
        after = [cpu_seconds([process.pid]) for process in (server, client)]
        used = [(b - a) / seconds for a, b in zip(before, after, strict=True)]
        return {
            "provider_cpu": used[0],
            "client_cpu": used[1],
            "provider_rss": resident(server.pid),
            "client_rss": resident(client.pid),
        }
