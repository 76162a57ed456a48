"""The command ``tools/bench``: measures, and writes the report."""

from __future__ import annotations

import argparse
import json
import mmap
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import counts, growth, machine, quick, report, startup
from benchmarks.api import measure_api
from benchmarks.mounts import Sizes, measure_mounts
from benchmarks.processes import ROOT, scratch
from benchmarks.rows import ROWS
from benchmarks.stats import Series
from benchmarks.subjects import own_sockets

HERE = Path(__file__).resolve().parent
SECTIONS = ("api", "growth", "startup", "mount", "files", "counts")
_TOUCHED = {"api": 1 << 29, "growth": 2 << 30, "mount": 6 << 30}
"""Bytes of memory that are used once before a section is measured."""

_started = time.monotonic()


def say(text: str) -> None:
    """Report progress on standard error."""
    print(f"{time.monotonic() - _started:6.0f} s  {text}", file=sys.stderr, flush=True)


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/bench",
        description="Measures this project and its peers side by side and writes a report.",
    )
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help="print a few ratios, and compare counts with the baseline; writes no report, and"
        " fails if a count grew to more than twice its baseline",
    )
    add(
        "--only",
        metavar="SECTION,...",
        default=",".join(SECTIONS),
        help=f"measure only these of {', '.join(SECTIONS)}; the report keeps the others' last"
        " results",
    )
    add(
        "--rows",
        metavar="TEXT",
        default="",
        help="measure only rows of the API and of files, and workloads of mounts, with this text",
    )
    add("--rounds", type=int, default=5, help="rounds of each measurement (default %(default)s)")
    add(
        "--seconds",
        type=float,
        default=0.2,
        help="of one round of one subject of the API (default %(default)s)",
    )
    add(
        "--scale",
        type=float,
        default=1.0,
        help="how much is done on mounts: 1 is files of 1 GiB, 5,000 small files and directories"
        " of 100,000 entries (default %(default)s)",
    )
    add(
        "--regions", type=int, default=1_000_000, help="of the largest target (default %(default)s)"
    )
    add(
        "--many",
        type=int,
        default=100_000,
        help="names, links, open files and so on beside which operations are measured; up to"
        " 1,000,000 (default %(default)s)",
    )
    add(
        "--disk",
        type=Path,
        default=ROOT / "build",
        metavar="DIR",
        help="directory on a disk, for files (default %(default)s)",
    )
    add(
        "--output",
        type=Path,
        default=HERE,
        metavar="DIR",
        help="where report.md, report.json and report/ go (default %(default)s)",
    )
    add(
        "--baseline",
        type=Path,
        default=HERE / "baseline.json",
        metavar="FILE",
        help="of the counts (default %(default)s)",
    )
    add(
        "--update-baseline",
        action="store_true",
        help="write the counts that are found to the baseline, instead of comparing them",
    )
    add("--no-measuring", action="store_true", help="write the report of the last results again")
    chosen = parser.parse_args(words)
    chosen.only = [] if chosen.no_measuring else chosen.only.split(",")
    for name in chosen.only:
        if name not in SECTIONS:
            parser.error(f"--only {name}: expected some of {', '.join(SECTIONS)}")
    return chosen


def _touch_memory(size: int) -> None:
    """Use memory once: a virtual machine's first use of its own is slow."""
    say("touching memory")
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) << 10 for line in file if "MemAvailable" in line)
    block = b"t" * (1 << 20)
    with mmap.mmap(-1, max(len(block), min(size, free // 2))) as memory:
        for _ in range(len(memory) // len(block)):
            memory.write(block)


def _json(series: Sequence[Series]) -> list[dict[str, Any]]:
    return [each.as_json() for each in series]


def _api(options: argparse.Namespace, disk: Path) -> dict[str, Any]:
    rows = [row for row in ROWS if options.rows in row.name]
    return {"series": _json(measure_api(disk, options.rounds, options.seconds, say, rows))}


def _growth(options: argparse.Namespace, disk: Path) -> dict[str, Any]:
    some = max(1, options.rounds // 2)
    sizes = [count for count in growth.REGIONS if count <= options.regions]
    return {
        "size": _json(growth.by_size(disk, some, options.seconds, say)),
        "outstanding": _json(growth.by_outstanding(disk, some, options.seconds, say)),
        "clients": _json(growth.by_clients(some, 2.0, say)),
        "regions": growth.by_regions(disk, sizes, options.regions, say),
        "numbers": growth.by_number(options.many, say),
    }


def _startup(options: argparse.Namespace, disk: Path) -> dict[str, Any]:
    return {"series": _json(startup.startup(options.rounds, say)), "idle": startup.idle(say)}


def _mount(options: argparse.Namespace, disk: Path) -> dict[str, Any]:
    sizes = Sizes(options.scale)
    return {"series": _json(measure_mounts(disk, options.rounds, sizes, say, options.rows))}


def _files(options: argparse.Namespace, disk: Path) -> dict[str, Any]:
    from benchmarks.files import files  # imports zarr

    return {"series": _json(files(options.rounds, options.seconds, say, options.rows))}


def _counts(options: argparse.Namespace, disk: Path) -> dict[str, Any]:
    return {"counts": counts.count(disk, say)}


_MEASURE: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "api": _api, "growth": _growth, "startup": _startup, "mount": _mount, "files": _files,
    "counts": _counts,
}  # fmt: skip


def _quick(options: argparse.Namespace, disk: Path) -> int:
    if "api" in options.only:
        quick.ratios_api(disk, say)
    if "mount" in options.only:
        quick.ratios_mount(disk, say)
    if "counts" not in options.only:
        return 0
    found = counts.count(disk, say)
    if options.update_baseline:
        counts.write_baseline(options.baseline, found)
        return 0
    return quick.compare(found, counts.read_baseline(options.baseline))


def _draw(directory: Path, results: dict[str, Any]) -> list[tuple[str, str]]:
    try:
        from benchmarks import plots
    except ModuleNotFoundError as error:  # what only tools/setup bench installs
        say(f"no plots: {error}")
        return []
    return plots.draw(directory, results)


def _write(options: argparse.Namespace, results: dict[str, Any]) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    ordered = {name: results[name] for name in SECTIONS if name in results}
    text = json.dumps(ordered, indent=1, ensure_ascii=False)
    (options.output / "report.json").write_text(text + "\n")
    drawn = _draw(options.output / "report", ordered)
    (options.output / "report.md").write_text(report.text(ordered, drawn))
    say(f"written: {options.output / 'report.md'}")


def _full(options: argparse.Namespace, disk: Path) -> int:
    last = options.output / "report.json"
    results: dict[str, Any] = json.loads(last.read_text()) if last.exists() else {}
    for name in options.only:
        if size := _TOUCHED.get(name):
            _touch_memory(int(size * min(1.0, options.scale)))
        before = machine.load()
        with scratch(disk) as place:
            found = _MEASURE[name](options, place)
        if name == "counts" and options.update_baseline:
            counts.write_baseline(options.baseline, found["counts"])
        results[name] = {
            "when": machine.now(), "commit": machine.commit(), "machine": machine.describe(disk),
            "rounds": options.rounds, "load": f"{before}, {machine.load()}", **found,
        }  # fmt: skip
        _write(options, results)
    if options.no_measuring:
        _write(options, results)
    return 0


def main(words: Sequence[str]) -> int:
    options = _arguments(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # cleaning up, as after ^C
    with scratch(options.disk.resolve()) as disk, own_sockets():
        return (_quick if options.quick else _full)(options, disk)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
