"""Measures mounts of this and other projects with the same workloads, in interleaved rounds."""

from __future__ import annotations

import contextlib
import json
import shutil
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import places
from benchmarks.api import Progress, resident_series
from benchmarks.load import Figures
from benchmarks.places import Place, place
from benchmarks.processes import Failed, run, run_module, scratch
from benchmarks.stats import Round, Series

MB_S, PER_S, MICROSECONDS = "MB/s", "1/s", "µs"
STREAMS = ("first write", "rewrite", "cold read", "warm read")
_IN_MEMORY = (
    places.TMPFS, places.BINDFS, places.RCLONE, places.OURS, places.OURS_EXCLUSIVE,
    places.OURS_PASSED, places.OURS_PYFUSE3,
)  # fmt: skip
_EVERYWHERE = (
    *_IN_MEMORY, places.DISK, places.OURS_FILE, places.OURS_FILE_EXCLUSIVE,
    places.OURS_FILE_PASSED, places.OURS_TCP,
)  # fmt: skip
_SHARED = (
    places.TMPFS, places.DISK, places.BINDFS, places.OURS, places.OURS_FILE,
    places.OURS_FILE_PASSED, places.OURS_PYFUSE3, places.OURS_TCP,
)  # fmt: skip
_FIO_SECONDS = 1.5


class Sizes:
    """How much is done.

    Attributes:
        stream: bytes of a file that is streamed.
        files: small files.
        entries: entries of a directory.
        tree: files of a tree.
        copy: bytes of a file that is copied.
        calls: calls of what takes a microsecond.
        fio: seconds of a random workload.
    """

    def __init__(self, scale: float) -> None:
        self.stream = max(16, int(1024 * scale)) << 20
        self.files = max(200, int(5000 * scale))
        self.entries = max(1000, int(100_000 * scale))
        self.tree = max(200, int(5000 * scale))
        self.copy = max(16, int(256 * scale)) << 20
        self.calls = max(500, int(5000 * scale))
        self.syncs = max(50, int(500 * scale))
        self.fio = max(0.5, _FIO_SECONDS * min(1.0, scale * 2))


def _load(name: str, number: int) -> Callable[[Place], Figures]:
    def run_it(where: Place) -> Figures:
        pids = map(str, where.pids)
        found: Figures = run_module(
            "benchmarks.load", name, str(where.path), str(number), *pids, timeout=300
        )
        return found

    return run_it


def _fio(mode: str, jobs: int, seconds: float) -> Callable[[Place], Figures]:
    """4 KiB at random with ``O_DIRECT``, in files of 32 MiB, one for each job."""

    def run_it(where: Place) -> Figures:
        with scratch(where.path) as directory:
            text = run(
                "fio", "--name=bench", f"--directory={directory}", f"--rw=rand{mode}", "--bs=4k",
                "--direct=1", "--ioengine=psync", "--size=32m", f"--numjobs={jobs}", "--thread",
                "--time_based", f"--runtime={seconds}", "--group_reporting",
                "--output-format=json", "--randrepeat=1", "--fallocate=none",
                timeout=120,
            )  # fmt: skip
        found = json.loads(text[text.index("{") :])["jobs"][0][mode]
        p99 = found["clat_ns"]["percentile"]["99.000000"] / 1000
        p50 = found["clat_ns"]["percentile"]["50.000000"] / 1000
        name = f"4 KiB random {mode}, O_DIRECT"
        if jobs > 1:
            return {f"{name}, {jobs} jobs": [found["iops"], p99, 0.0]}
        return {name: [found["iops"], p99, 0.0], f"{name}: p99/p50": [p99 / p50, 0.0, 0.0]}

    return run_it


def make_tree(path: Path, files: int) -> None:
    """A tar archive of *files* small files in directories of 50."""
    tree = path.with_suffix(".tree")
    for number in range(files):
        file = tree / f"directory{number // 50:03}" / f"file{number:05}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"tree\n" * (number % 800))
    with tarfile.open(path, "w") as archive:
        archive.add(tree, "tree")
    shutil.rmtree(tree)


def _untar(archive: Path, files: int) -> Callable[[Place], Figures]:
    def run_it(where: Place) -> Figures:
        with scratch(where.path) as directory:
            start = time.perf_counter()
            run("tar", "-xf", archive, "-C", directory, timeout=300)
            return {"untar, files": [files / (time.perf_counter() - start), 0.0, 0.0]}

    return run_it


def unit(row: str) -> str:
    if row in STREAMS:
        return MB_S
    if row.startswith(("fsync", "cp ", "ls ", "readlink", "lock ")):
        return MICROSECONDS
    return "ratio" if row.endswith("p99/p50") else PER_S


def _turns(
    name: str,
    names: Iterable[str],
    work: Callable[[Place], Figures],
    rounds: int,
    places_: dict[str, Place],
    say: Progress,
) -> list[Series]:
    """*rounds* of *work* at each place in turn; one that fails is left out from then on."""
    found: dict[tuple[str, str], Series] = {}
    failed: dict[str, str] = {}
    for number in range(rounds):
        for subject in names:
            if subject not in places_ or subject in failed:
                continue
            say(f"mount: {name}, round {number + 1} of {rounds}, {subject}")
            try:
                figures = work(places_[subject])
            except Failed as error:
                failed[subject] = str(error)
                say(f"mount: {name}, {subject}: {error}")
                found[name, subject] = Series(name, subject, PER_S, failure=str(error))
                continue
            for row, (value, p99, cpu) in figures.items():
                series = found.setdefault((row, subject), Series(row, subject, unit(row)))
                series.rounds.append(Round(value, p99, 1, cpu))
    return list(found.values())


def measure_mounts(
    disk: Path, rounds: int, sizes: Sizes, say: Progress, text: str = ""
) -> list[Series]:
    """Every workload with *text* in its name, at every place that can be made.

    *disk* is a directory on a disk.
    """
    done: list[Series] = []
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(scratch(places.SHM))
        there: dict[str, Place] = {}
        for name in _EVERYWHERE:
            try:
                there[name] = stack.enter_context(place(name, memory, disk))
            except Failed as error:
                say(f"without {name}: {error}")
        archive = memory / "tree.tar"
        make_tree(archive, sizes.tree)
        works = [
            ("streams", _EVERYWHERE, _load("streams", sizes.stream)),
            ("4 KiB random read, O_DIRECT", _EVERYWHERE, _fio("read", 1, sizes.fio)),
            ("4 KiB random write, O_DIRECT", _EVERYWHERE, _fio("write", 1, sizes.fio)),
            ("4 KiB random read, O_DIRECT, 4 jobs", _IN_MEMORY, _fio("read", 4, sizes.fio)),
            ("4 KiB random write, O_DIRECT, 4 jobs", _IN_MEMORY, _fio("write", 4, sizes.fio)),
            ("buffered", _EVERYWHERE, _load("buffered", sizes.files * 2)),
            ("small files", _EVERYWHERE, _load("small", sizes.files)),
            ("readdir with attributes", _IN_MEMORY, _load("listing", sizes.entries)),
            ("untar", _EVERYWHERE, _untar(archive, sizes.tree)),
            ("fsync of 4 KiB",
             (places.DISK, places.OURS_FILE, places.OURS_FILE_EXCLUSIVE, places.OURS_FILE_PASSED),
             _load("synced", sizes.syncs)),
            ("cp of a sparse file", _SHARED, _load("sparse", sizes.stream)),
            ("cp of a file", _SHARED, _load("copied", sizes.copy)),
            ("ls -l, again", _SHARED, _load("relisted", 1000)),
            ("readlink", _SHARED, _load("links", sizes.calls)),
            ("lock and unlock", _SHARED, _load("locks", sizes.calls)),
        ]  # fmt: skip
        for title, names, work in works:
            if text not in title:
                continue
            done += _turns(title, names, work, rounds, there, say)
        for name, where in there.items():
            if where.pids:
                done.append(resident_series(name, where.pids))
    return done
