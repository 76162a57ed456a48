"""The report's plots, as SVG."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

from benchmarks import mounts
from benchmarks.stats import Series

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "warabi"  # the same plot is the same file
matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text, and small
_SIZE = (8.0, 4.5)


def _lines(series: Iterable[Series]) -> dict[str, tuple[list[float], list[float]]]:
    """Points by subject; the rows are numbers."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for each in series:
        xs, ys = found.setdefault(each.subject, ([], []))
        xs.append(float(each.row))
        ys.append(each.value)
    return found


def _style(subject: str) -> dict[str, Any]:
    return {"linewidth": 2.2} if subject.startswith("memory") else {"linewidth": 1, "ls": "--"}


def lines(path: Path, series: Iterable[Series], title: str, xlabel: str, ylabel: str) -> None:
    """A line for each subject, on logarithmic axes."""
    figure, axes = pyplot.subplots(figsize=_SIZE, layout="constrained")
    for subject, (xs, ys) in _lines(series).items():
        axes.loglog(xs, ys, marker=".", label=subject, base=2, **_style(subject))
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.set_yscale("log", base=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    _save(path, figure)


def regions(path: Path, told: Iterable[dict[str, Any]]) -> None:
    """Time and memory by the number of regions in memory."""
    some = [each for each in told if each["backend"] == "memory" and each["size"] == 64]
    counts = [each["regions"] for each in some]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=_SIZE, layout="constrained")
    for name, label in (("create", "create_and_write"), ("read", "read_into, at random")):
        left.semilogx(counts, [each[name] for each in some], marker="o", label=label)
    left.set(xlabel="regions", ylabel="µs", ylim=0, title="time of a call, 64 B")
    left.legend(fontsize=8)
    right.semilogx(counts, [each["memory"] for each in some], marker="o")
    right.set(xlabel="regions", ylabel="bytes", ylim=0, title="memory of a region of 64 B")
    _save(path, figure)


def bars(path: Path, series: Iterable[Series], rows: Iterable[str], title: str) -> None:
    """Bars of the places for each row, on a logarithmic axis."""
    found = {(each.row, each.subject): each for each in series if each.rounds}
    names = list(rows)
    subjects = list(dict.fromkeys(subject for row, subject in found if row in names))
    figure, axes = pyplot.subplots(figsize=_SIZE, layout="constrained")
    width = 0.8 / max(1, len(subjects))
    for number, subject in enumerate(subjects):
        xs, ys, errors = [], [], []
        for place, row in enumerate(names):
            if each := found.get((row, subject)):
                xs.append(place + number * width)
                ys.append(each.value)
                errors.append(each.spread * each.value / 2)
        ours = subject.startswith("warabifs")
        axes.bar(xs, ys, width, yerr=errors, label=subject, hatch="//" if ours else None)
    axes.set_yscale("log")
    labels = [textwrap.fill(name, 14) for name in names]
    axes.set_xticks([place + 0.4 for place in range(len(names))], labels, fontsize=7)
    axes.set(title=title)
    axes.legend(fontsize=7)
    _save(path, figure)


def _save(path: Path, figure: Any) -> None:
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def draw(directory: Path, results: dict[str, Any]) -> list[tuple[str, str]]:
    """Title and file name of every plot that the results allow."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn = []

    def add(name: str, title: str) -> Path:
        drawn.append((title, f"{directory.name}/{name}.svg"))
        return directory / f"{name}.svg"

    if "growth" in results:
        told = results["growth"]
        title = "read_into by size"
        lines(add("size", title), map(Series.from_json, told["size"]), title, "bytes", "µs")
        title = "4 KiB writes by requests under way"
        outstanding = map(Series.from_json, told["outstanding"])
        lines(add("outstanding", title), outstanding, title, "requests", "µs for each")
        title = "4 KiB reads by clients"
        crowd = [Series.from_json(each) for each in told["clients"] if each["unit"] == "1/s"]
        lines(add("clients", title), crowd, title, "clients, each a process", "reads a second")
        regions(add("regions", "By number of regions"), told["regions"])
    if "mount" in results:
        series = [Series.from_json(each) for each in results["mount"]["series"]]
        title = "Streams through mounts, MB/s"
        bars(add("streams", title), series, mounts.STREAMS, title)
        rows = [row for row in dict.fromkeys(each.row for each in series)
                if mounts.unit(row) == mounts.PER_S and "jobs" not in row]  # fmt: skip
        title = "Operations a second through mounts"
        bars(add("operations", title), series, rows, title)
    return drawn
