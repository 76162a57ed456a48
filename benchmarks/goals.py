"""Performance goals, and whether a run met them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import places, startup
from benchmarks.rows import ROWS
from benchmarks.stats import Series
from benchmarks.subjects import BACKENDS, WAYS

Table = dict[tuple[str, str], Series]
"""Series by row and subject."""


@dataclass(frozen=True)
class Verdict:
    """One goal: its description, the measured value, and the wanted one."""

    what: str
    value: float
    limit: float
    goal: str
    less: bool = True  # whether less is better

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.less else self.value >= self.limit

    @property
    def known(self) -> bool:
        return self.value == self.value and self.limit == self.limit  # no NaN


def table(series: Iterable[Series]) -> Table:
    return {(each.row, each.subject): each for each in series}


def _value(found: Table, row: str, subject: str) -> float:
    series = found.get((row, subject))
    return series.value if series else float("nan")


def api(found: Table) -> Iterator[Verdict]:
    """Every row, backend and way that has a goal."""
    for row in ROWS:
        peers = {
            subject: _value(found, name, subject) for name, subject in found if name == row.name
        }
        for backend in BACKENDS:
            for way in WAYS:
                if goal := row.goal(backend, way):
                    subject = f"{backend}, {way}"
                    value = _value(found, row.name, subject)
                    yield Verdict(f"{row.name}, {subject}", value, goal.value(peers), f"{goal} µs")


_FASTER: Sequence[tuple[str, str, float, str]] = (
    ("rewrite", places.OURS, 0.33, places.TMPFS),
    ("first write", places.OURS, 0.25, places.TMPFS),
    ("cold read", places.OURS, 1.1, places.BINDFS),
    ("warm read", places.OURS, 0.9, places.TMPFS),
    ("4 KiB random read, O_DIRECT", places.OURS, 1.3, places.BINDFS),
    ("4 KiB random write, O_DIRECT", places.OURS, 1.5, places.BINDFS),
    ("4 KiB random write, buffered", places.OURS_EXCLUSIVE, 5.0, places.BINDFS),
    ("create + write 100 B + close", places.OURS, 1.0, places.BINDFS),
    ("stat", places.OURS, 1.2, places.BINDFS),
    ("readdir with attributes", places.OURS, 1.0, places.BINDFS),
    ("untar, files", places.OURS, 1.0, places.BINDFS),
    ("rewrite", places.OURS_PASSED, 0.33, places.TMPFS),
    ("cold read", places.OURS_PASSED, 1.1, places.BINDFS),
    ("4 KiB random read, O_DIRECT", places.OURS_PASSED, 1.3, places.BINDFS),
    ("4 KiB random write, O_DIRECT", places.OURS_PASSED, 1.5, places.BINDFS),
    ("create + write 100 B + close", places.OURS_PASSED, 1.0, places.BINDFS),
    ("rewrite", places.OURS_FILE, 0.8, places.OURS),
    ("cold read", places.OURS_FILE, 0.8, places.OURS),
    ("rewrite", places.OURS_TCP, 0.6, places.OURS),
    ("cold read", places.OURS_TCP, 0.6, places.OURS),
)

_AT_MOST = (("cp of a sparse file", 100_000.0), ("readlink", 2.0))
"""Rows with a limit in µs."""
_COUNTS = (
    # Each for security.selinux, which ls asks for and the kernel cannot keep.
    ("mount, entry listed again by ls -l: FUSE requests", 1.05),
    ("mounts of one provider, lock taken and released: messages", 3.0),
)


def mount(found: Table) -> Iterator[Verdict]:
    """The rows of mounts; each is compared with another place in the same run."""
    for row, ours, factor, peer in _FASTER:
        limit = factor * _value(found, row, peer)
        goal = f"≥ {factor:g} × {peer}"
        yield Verdict(f"{row}, {ours}", _value(found, row, ours), limit, goal, less=False)
    for kind in ("read", "write"):
        row = f"4 KiB random {kind}, O_DIRECT"
        value, one = (_value(found, name, places.OURS) for name in (f"{row}, 4 jobs", row))
        yield Verdict(f"{row}, 4 jobs, {places.OURS}", value, one, "≥ one job", less=False)
        tail = _value(found, f"{row}: p99/p50", places.OURS)
        yield Verdict(f"{row}: p99/p50, {places.OURS}", tail, 4.0, "≤ 4")
    for row in ("fsync of 4 KiB", "cp of a file"):
        limit = 1.5 * _value(found, row, places.DISK)
        value, goal = _value(found, row, places.OURS_FILE), f"≤ 1.5 × {places.DISK}"
        yield Verdict(f"{row}, {places.OURS_FILE}", value, limit, goal)
    for row, limit in _AT_MOST:
        for ours in (places.OURS, places.OURS_FILE):
            yield Verdict(f"{row}, {ours}", _value(found, row, ours), limit, f"≤ {limit:,.0f} µs")


_FILES: Sequence[tuple[str, str, float, str]] = (
    ("cat 1 MiB", "fsspec over na+sm", 1 / 0.7, "LocalFileSystem on tmpfs"),
    ("cat 4 KiB", "fsspec over na+sm", 1 / 0.3, "LocalFileSystem on tmpfs"),
    ("pipe 1 MiB", "fsspec over na+sm", 1 / 0.7, "LocalFileSystem on tmpfs"),
    ("pipe 4 KiB", "fsspec over na+sm", 1 / 0.3, "LocalFileSystem on tmpfs"),
    ("ls of 10,000 entries", "fsspec over na+sm", 1.5, "LocalFileSystem on tmpfs"),
    ("cp -r or warabi cp -r of 5,000 files", "fsspec over na+sm", 1.0, "mount of na+sm"),
    ("zarr, 1,024 chunks, write", "fsspec over na+sm", 2.0, "embedded mount"),
    ("zarr, 1,024 chunks, read", "fsspec over na+sm", 2.0, "embedded mount"),
    ("zarr, 1,024 chunks, write", "mount of na+sm", 2.5, "embedded mount"),
    ("zarr, 1,024 chunks, read", "mount of na+sm", 2.5, "embedded mount"),
)


def files(found: Table) -> Iterator[Verdict]:
    """Whole files by path; each is compared with another place in the same run."""
    for row, ours, factor, peer in _FILES:
        limit = factor * _value(found, row, peer)
        goal = f"≤ {factor:.3g} × {peer}"
        yield Verdict(f"{row}, {ours}", _value(found, row, ours), limit, goal)


def starting(series: Iterable[Series], idle: dict[str, float]) -> Iterator[Verdict]:
    """Imports, an engine with a provider, and processes at rest; microseconds and CPU seconds."""
    for each in series:
        if limit := startup.LIMITS.get(each.row):
            yield Verdict(each.row, each.value, limit, f"≤ {limit:,.0f} µs")
    for who in ("provider", "client"):
        used = idle.get(f"{who}_cpu", float("nan"))
        yield Verdict(f"CPU of an idle {who}", used, 0.001, "≤ 0.001 s/s")


def numbers(costs: Iterable[dict[str, Any]]) -> Iterator[Verdict]:
    """The cost of an operation does not depend on the number of regions, names and open files."""
    by_operation: dict[str, dict[int, float]] = {}
    for each in costs:
        by_operation.setdefault(each["operation"], {})[each["count"]] = each["cost"]
    for operation, found in by_operation.items():
        fewest, most = min(found), max(found)
        what = f"{operation}: {most:,} ÷ {fewest:,}"
        yield Verdict(what, found[most] / found[fewest], 3.0, "≤ 3")


def counted(counts: dict[str, float]) -> Iterator[Verdict]:
    """Counts that have a goal of their own; the others are compared with a baseline."""
    for name, limit in _COUNTS:
        yield Verdict(name, counts.get(name, float("nan")), limit, f"≤ {limit:g}")


def growth(clients: Iterable[Series], regions: Iterable[dict[str, Any]]) -> Iterator[Verdict]:
    """Many clients, and many regions."""
    rates = {(each.subject, each.row): each.value for each in clients if each.unit == "1/s"}
    for (subject, row), value in rates.items():
        if row == "16" and (one := rates.get((subject, "1"))) is not None:
            yield Verdict(f"16 clients, {subject}", value, one, "≥ one client", less=False)
    for each in clients:
        if each.unit == "ratio" and each.row == "16":
            what = f"fastest ÷ slowest of 16 clients, {each.subject}"
            yield Verdict(what, each.value, 2.0, "≤ 2")
    for told in regions:
        what = f"{told['regions']:,} regions of {told['size']} B, {told['backend']}"
        if told["backend"] == "memory" and told["size"] == 4096 and told["regions"] >= 100_000:
            cost = told["memory"] / told["size"]
            yield Verdict(f"memory ÷ payload, {what}", cost, 1.3, "≤ 1.3")
        if "open" in told and told["regions"] >= 1_000_000:
            yield Verdict(f"seconds to open, {what}", told["open"], 1.0, "≤ 1 s")
