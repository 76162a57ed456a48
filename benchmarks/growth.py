"""Scaling: cost by size, pending requests, clients, and number of regions, names and open files."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import many
from benchmarks.api import Progress, all_peers, measure_row
from benchmarks.processes import line_of, provider, run_module, running
from benchmarks.rows import KIB, Row, copies, outstanding, shown
from benchmarks.stats import Round, Series, measure
from benchmarks.subjects import MEMORY, subjects

SIZES = [64 * 4**power for power in range(10)]
OUTSTANDING = [1, 4, 16, 64]
CLIENTS = [1, 4, 16, 64]
REGIONS = [1000, 10_000, 100_000, 1_000_000]
NUMBERS = [1000, 10_000, 100_000, 1_000_000]


def by_size(directory: Path, rounds: int, budget: float, say: Progress) -> list[Series]:
    """``read_into`` of memory by every way, and the peers; the rows are named by bytes."""
    done: list[Series] = []
    with subjects(directory) as ours, all_peers(directory, say) as found:
        some = [subject for subject in ours if subject.backend == "memory"]
        for size in SIZES:
            say(f"growth: size {shown(size)}")
            reading = copies(size)[1]
            row = Row(reading.name, size, reading.make)
            for series in measure_row(row, some, found, rounds, budget):
                series.row = str(size)
                done.append(series)
    return done


def by_outstanding(directory: Path, rounds: int, budget: float, say: Progress) -> list[Series]:
    """Writes of 4 KiB to memory, so many under way at once; microseconds for each."""
    done: list[Series] = []
    with subjects(directory) as ours:
        some = [subject for subject in ours if subject.backend == "memory"]
        for count in OUTSTANDING:
            say(f"growth: {count} requests under way")
            works = {each.name: outstanding(4 * KIB, count, each.target) for each in some}
            series = {name: Series(str(count), name) for name in works}
            for number in range(rounds + 1):
                for name, work in works.items():
                    took = measure(work, budget)
                    if number:
                        series[name].rounds.append(took)
            done += series.values()
    return done


def _crowd(address: str, clients: int, seconds: float) -> list[int]:
    """How many reads each client got done."""
    command = [sys.executable, "-m", "benchmarks.crowd", address, str(seconds)]
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(running(command)) for _ in range(clients)]
        for process in crowd:
            line_of(process)
        for process in crowd:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return [int(line_of(process, 30 + seconds)) for process in crowd]


def by_clients(rounds: int, seconds: float, say: Progress) -> list[Series]:
    """Reads of 4 KiB a second, of all clients, and of the fastest as a multiple of the slowest."""
    rates, fairness = [], []
    for transport, way in (("na+sm", "two processes"), ("tcp", "TCP")):
        with provider(transport, [MEMORY]) as (address, _):
            for clients in CLIENTS:
                say(f"growth: {clients} clients, {way}")
                rate = Series(str(clients), f"memory, {way}", unit="1/s")
                fair = Series(str(clients), f"memory, {way}", unit="ratio")
                for _ in range(rounds):
                    counts = _crowd(address, clients, seconds)
                    rate.rounds.append(Round(sum(counts) / seconds))
                    fair.rounds.append(Round(max(counts) / max(1, min(counts))))
                rates.append(rate)
                fairness.append(fair)
    return [*rates, *fairness]


def by_regions(
    directory: Path, counts: Sequence[int], files: int, say: Progress
) -> list[dict[str, Any]]:
    """What :mod:`benchmarks.regions` tells of each number of regions; once, for it takes long.

    Args:
        files: how many regions the largest file target has.
    """
    found = []
    asked = [("memory", count, 64) for count in counts]
    asked += [("memory", min(100_000, max(counts)), 4 * KIB), ("file", min(10_000, files), 64)]
    if files > 10_000:
        asked.append(("file", files, 64))
    for backend, count, size in asked:
        say(f"growth: {count:,} regions of {shown(size)}, {backend}")
        with tempfile.TemporaryDirectory(prefix="regions-", dir=directory) as place:
            told = run_module(
                "benchmarks.regions", backend, str(count), str(size), place, timeout=900
            )
        found.append({"backend": backend, "regions": count, "size": size, **told})
    return found


def by_number(most: int, say: Progress) -> list[dict[str, Any]]:
    """Microseconds of operations while there are so many names, links, attributes, regions,
    clients, entries of a mounted directory and open files, *most* at most."""
    counts = [str(count) for count in NUMBERS if count <= most]
    found = []
    for kind in many.KINDS:
        say(f"growth: {kind}, up to {most:,}")
        for operation, count, cost in run_module("benchmarks.many", kind, *counts, timeout=900):
            found.append({"kind": kind, "operation": operation, "count": count, "cost": cost})
    return found
