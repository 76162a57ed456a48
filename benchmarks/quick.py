"""``tools/bench --quick``: prints time ratios, and fails if counts of system calls have grown."""

from __future__ import annotations

from pathlib import Path

from benchmarks import places, rows
from benchmarks.api import Progress, all_peers, measure_row
from benchmarks.counts import Counts, regressions
from benchmarks.goals import table
from benchmarks.load import Figures
from benchmarks.peers import COPY_TCP, MEMCPY
from benchmarks.processes import Failed, run_module, scratch
from benchmarks.report import number
from benchmarks.subjects import subjects

_ROUNDS, _BUDGET = 2, 0.05


def ratios_api(directory: Path, say: Progress) -> None:
    """Print what copies cost, as multiples of the machine's own."""
    print("copies of memory, µs, and as a multiple of memcpy (same host) or of a bare copy (TCP)")
    with subjects(directory) as ours, all_peers(directory, say) as found:
        some = [subject for subject in ours if subject.backend == "memory"]
        for size in (4 * rows.KIB, rows.MIB):
            for row in rows.copies(size):
                measured = table(measure_row(row, some, found, _ROUNDS, _BUDGET))
                for subject in some:
                    peer = COPY_TCP if subject.way == "TCP" else MEMCPY
                    value, limit = measured[row.name, subject.name], measured[row.name, peer]
                    times = number(value.value / limit.value)
                    print(f"  {row.name}, {subject.way}: {number(value.value)}, {times} ×")


def ratios_mount(disk: Path, say: Progress) -> None:
    """Print what a mount's operations reach, as parts of tmpfs's."""
    print("mount of a target in memory, and as a part of tmpfs")
    found: dict[str, Figures] = {}
    with scratch(places.SHM) as memory:
        for name in (places.TMPFS, places.OURS, places.BINDFS):
            try:
                with places.place(name, memory, disk) as place:
                    found[name] = {}
                    for load, amount in (("streams", 64 << 20), ("small", 300), ("direct", 1000)):
                        pids = map(str, place.pids)
                        words = (load, str(place.path), str(amount), *pids)
                        found[name] |= run_module("benchmarks.load", *words)
            except Failed as error:
                say(f"without {name}: {error}")
    limits = found.pop(places.TMPFS)
    for name, figures in found.items():
        for row, (value, _, _) in figures.items():
            part = number(value / limits[row][0])
            print(f"  {row}, {name}: {number(value)}, {part} ×")


def compare(counts: Counts, baseline: Counts) -> int:
    """Print what changed of the counts; 1 if something grew grossly, otherwise 0."""
    print(f"{len(counts)} counts, for one operation each; those that differ from the baseline:")
    for name, value in counts.items():
        before = baseline.get(name)
        if before is None:
            print(f"  {name}: {value:g}, new")
        elif abs(value - before) > max(0.5, before / 10):
            print(f"  {name}: {value:g}, was {before:g}")
    found = regressions(counts, baseline)
    for line in found:
        print(f"REGRESSION: {line}")
    if not found:
        print("no count grew grossly")
    return 1 if found else 0
