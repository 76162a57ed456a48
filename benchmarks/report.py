"""Formats the results as a Markdown report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks import goals, mounts, peers
from benchmarks.goals import Table, Verdict
from benchmarks.rows import ROWS, Row
from benchmarks.stats import MEGABYTES, RESIDENT, Series
from benchmarks.subjects import BACKENDS, WAYS


def number(value: float) -> str:
    """Three digits, or a dash for what was not measured."""
    if value != value:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _series(found: Iterable[dict[str, Any]]) -> list[Series]:
    return [Series.from_json(each) for each in found]


def verdicts(results: dict[str, Any]) -> list[Verdict]:
    """Every goal that the results tell something about."""
    found: list[Verdict] = []
    if "api" in results:
        found += goals.api(goals.table(_series(results["api"]["series"])))
    if "growth" in results:
        told = results["growth"]
        found += goals.growth(_series(told["clients"]), told["regions"])
        found += goals.numbers(told.get("numbers", ()))
    if "startup" in results:
        told = results["startup"]
        found += goals.starting(_series(told["series"]), told["idle"])
    if "mount" in results:
        found += goals.mount(goals.table(_series(results["mount"]["series"])))
    if "files" in results:
        found += goals.files(goals.table(_series(results["files"]["series"])))
    if "counts" in results:
        found += goals.counted(results["counts"]["counts"])
    return found


def _head(results: dict[str, Any], found: list[Verdict]) -> Iterator[str]:
    known = [each for each in found if each.known]
    yield "# Benchmarks"
    yield ""
    yield "Written by `tools/bench`; [README.md](README.md) says how to read it."
    yield ""
    rows = [
        (name, told["when"], told["commit"], str(told["rounds"]), told["load"])
        for name, told in results.items()
    ]
    yield from _grid(["section", "measured", "of commit", "rounds", "load, before and after"], rows)
    if any(float(told["load"].split(",")[0]) > 1 for told in results.values()):
        yield "**The machine had other work meanwhile**: times are worse than on a quiet one, and"
        yield "those of what needs another process to wake up may be better."
        yield ""
    machine = next(iter(results.values()))["machine"]
    yield f"{machine}."
    yield ""
    met = sum(each.met for each in known)
    yield f"**{met} of {len(known)} goals met**; {len(found) - len(known)} could not be looked at."
    yield ""


def _not_met(found: list[Verdict]) -> Iterator[str]:
    yield "## Goals that were not met"
    yield ""
    rows = []
    for each in found:
        if each.known and not each.met:
            times = each.value / each.limit if each.less else each.limit / each.value
            row = (each.what, number(each.value), each.goal, number(each.limit), f"{times:.2f} ×")
            rows.append(row)
        elif not each.known:
            rows.append((each.what, "–", each.goal, "–", "not measured"))
    yield from _grid(["what", "measured", "goal", "which was", "short by"], rows)


def _against(row: Row, backend: str, way: str) -> str:
    """The peer that does the least of what the row does."""
    alone = backend == "file" and way == WAYS[0]
    if row.operation == "persist" or (alone and row.operation in peers.KERNEL):
        return peers.KERNEL[row.operation]
    if row.moves or row.reads:
        return peers.COPY_TCP if way == "TCP" else peers.MEMCPY
    return peers.PING_TCP if way == "TCP" else peers.PING_UNIX


def _api(found: Table) -> Iterator[str]:
    yield "## API"
    yield ""
    yield "Medians of the rounds' medians, µs a call. “Spread” is from the fastest to the slowest"
    yield "round, as a part of the median. The figures of C++ are of another machine of this kind."
    yield "“× least” is the time as a multiple of that of the peer that does the least of it in the"
    yield "same rounds: memcpy, a bare copy over TCP, ping-pong, `pwrite` and `fdatasync`, or,"
    yield "in the same process, the system calls that make or remove a region's file."
    yield ""
    rows = []
    met = {each.what: each for each in goals.api(found)}
    for row in ROWS:
        for backend in BACKENDS:
            for way in WAYS:
                subject = f"{backend}, {way}"
                if (series := found.get((row.name, subject))) is None:
                    continue
                least = found.get((row.name, _against(row, backend, way)))
                verdict = met.get(f"{row.name}, {subject}")
                goal = f"{verdict.goal} = {number(verdict.limit)}" if verdict else ""
                if verdict and "×" not in verdict.goal:
                    goal = verdict.goal
                rows.append((
                    row.name, backend, way, f"**{number(series.value)}**",
                    f"{series.spread:.0%}", number(series.p99),
                    number(series.value / least.value) if least else "", goal.replace(" µs", ""),
                    ("yes" if verdict.met else "**no**") if verdict and verdict.known else "",
                    row.original.get(subject, ""),
                ))  # fmt: skip
    head = ["operation", "backend", "way", "µs", "spread", "p99", "× least", "goal", "met", "C++"]
    yield from _grid(head, rows)


def _peers(found: Table) -> Iterator[str]:
    ours = {f"{backend}, {way}" for backend in BACKENDS for way in WAYS}
    known = {row.name for row in ROWS}
    names = list(dict.fromkeys(who for row, who in found if row in known and who not in ours))
    rows = []
    for row in ROWS:
        cells = []
        for name in names:
            series = found.get((row.name, name))
            cells.append(number(series.value) if series else "")
        if any(cells):
            rows.append((row.name, *cells))
    yield "### Peers in the same rounds, µs"
    yield ""
    yield from _grid(["operation", *names], rows)


def _cost(found: Table) -> Iterator[str]:
    yield "### Processor seconds for a GiB"
    yield ""
    yield "Of the client and the provider, including time in the kernel."
    yield ""
    rows = []
    for subject in dict.fromkeys(subject for _, subject in found):
        cells = []
        for row in ROWS:
            if row.moves and row.size >= 65536:
                series = found.get((row.name, subject))
                cells.append(number(series.cpu) if series and series.cpu else "")
        if any(cells):
            rows.append((subject, *cells))
    head = [row.name for row in ROWS if row.moves and row.size >= 65536]
    yield from _grid(["", *head], rows)
    some = [each for (row, _), each in found.items() if row == RESIDENT]
    if some:
        yield "### MB of resident memory of a provider of both backends"
        yield ""
        yield from _matrix(some, "", "value")


def _matrix(series: list[Series], first: str, value: str) -> Iterator[str]:
    """Rows by subjects; the cells are the series' medians, or their *value*."""
    found = goals.table(series)
    subjects = list(dict.fromkeys(subject for _, subject in found))
    rows = []
    for row in dict.fromkeys(row for row, _ in found):
        cells = []
        for subject in subjects:
            each = found.get((row, subject))
            cells.append(number(getattr(each, value)) if each and each.rounds else "")
        rows.append((row, *cells))
    yield from _grid([first, *subjects], rows)


def _growth(told: dict[str, Any]) -> Iterator[str]:
    yield "## Growth"
    yield ""
    yield "`read_into` from a target in memory, µs by size in bytes:"
    yield ""
    yield from _matrix(_series(told["size"]), "bytes", "value")
    yield "`write_async` of 4 KiB, µs for each of so many under way:"
    yield ""
    yield from _matrix(_series(told["outstanding"]), "under way", "value")
    clients = _series(told["clients"])
    yield "Clients, each a process, that read 4 KiB; reads a second of all of them, and how many"
    yield "times as many the fastest made as the slowest:"
    yield ""
    fair = {(each.row, each.subject): each.value for each in clients if each.unit == "ratio"}
    rows = [
        (each.row, each.subject, number(each.value), f"{fair[each.row, each.subject]:.2f}")
        for each in clients
        if each.unit != "ratio"
    ]
    yield from _grid(["clients", "way", "reads a second", "fastest ÷ slowest"], rows)
    yield "Regions in one target, same process; µs, and bytes of memory that the process and its"
    yield "memfds take for each. Regions of files are holes."
    yield ""
    many = [
        (
            f"{each['regions']:,}", f"{each['size']} B", each["backend"], number(each["create"]),
            number(each["read"]), number(each["memory"]),
            f"{each['open'] * 1000:,.0f} ms" if "open" in each else "",
        )
        for each in told["regions"]
    ]  # fmt: skip
    head = ["regions", "size", "backend", "create", "read at random", "memory", "open again"]
    yield from _grid(head, many)
    if "numbers" in told:
        yield "What operations cost while there are so many of something, µs:"
        yield ""
        rows = [
            (each["kind"], f"{each['count']:,}", each["operation"], number(each["cost"]))
            for each in told["numbers"]
        ]
        yield from _grid(["of", "so many", "operation", "µs"], rows)


def _startup(told: dict[str, Any]) -> Iterator[str]:
    yield "## Starting, and doing nothing"
    yield ""
    rows = [
        (each.row, f"{each.value / 1000:.1f} ms", f"{each.spread:.0%}")
        for each in _series(told["series"])
    ]
    yield from _grid(["in a new process", "time", "spread"], rows)
    idle = told["idle"]
    rows = [
        (who, f"{idle[f'{who}_cpu']:.4f} s/s", f"{idle[f'{who}_rss'] / 1e6:.0f} MB")
        for who in ("provider", "client")
    ]
    yield from _grid(["at rest", "processor time", "resident memory"], rows)


def _mount(series: list[Series]) -> Iterator[str]:
    yield "## Mounts"
    yield ""
    kinds = {
        mounts.MB_S: "Streams in blocks of 1 MiB, MB/s (more is better)",
        mounts.PER_S: "Operations a second (more is better)",
        mounts.MICROSECONDS: "µs (less is better)",
        "ratio": "99th percentile as a multiple of the median",
        MEGABYTES: "MB of resident memory of the processes that serve",
    }
    for unit, title in kinds.items():
        some = [each for each in series if each.unit == unit and each.rounds]
        if some:
            yield f"### {title}"
            yield ""
            yield from _matrix(some, "", "value")
    streams = [each for each in series if each.row in mounts.STREAMS]
    yield "### Processor seconds for a GiB"
    yield ""
    yield from _matrix(streams, "", "cpu")
    yield "### Spread of the rounds, as a part of the median"
    yield ""
    several = [each for each in series if each.unit not in ("ratio", MEGABYTES)]
    yield from _matrix(several, "", "spread")
    failures = [(each.row, each.subject, each.failure) for each in series if each.failure]
    if failures:
        yield "### What did not work"
        yield ""
        yield from _grid(["row", "place", "why"], failures)
    yield "### Goals"
    yield ""
    rows = [
        (each.what, number(each.value), f"{each.goal} = {number(each.limit)}",
         f"{each.value / each.limit:.2f}" if each.known else "–",
         ("yes" if each.met else "**no**") if each.known else "–")
        for each in goals.mount(goals.table(series))
    ]  # fmt: skip
    yield from _grid(["row", "measured", "goal", "measured ÷ goal", "met"], rows)


def _files(series: list[Series]) -> Iterator[str]:
    yield "## Whole files by path"
    yield ""
    yield "µs for a file, a listing or a chunk. All bytes are on tmpfs."
    yield ""
    rows = [(each.row, each.subject, number(each.value), f"{each.spread:.0%}") for each in series]
    yield from _grid(["operation", "with", "µs", "spread"], rows)


def _counts(counts: dict[str, float]) -> Iterator[str]:
    yield "## Counts"
    yield ""
    yield "For one operation; they depend on the code and hardly on the machine."
    yield ""
    yield from _grid(["what", "count"], ((name, f"{value:g}") for name, value in counts.items()))


def text(results: dict[str, Any], plots: Sequence[tuple[str, str]] = ()) -> str:
    """The whole report.

    Args:
        results: by section; each section also says when and of what it is.
        plots: title and file name.
    """
    found = verdicts(results)
    lines = [*_head(results, found), *_not_met(found)]
    if "api" in results:
        rows = goals.table(_series(results["api"]["series"]))
        lines += [*_api(rows), *_peers(rows), *_cost(rows)]
    if "growth" in results:
        lines += _growth(results["growth"])
    if "startup" in results:
        lines += _startup(results["startup"])
    if "mount" in results:
        lines += _mount(_series(results["mount"]["series"]))
    if "files" in results:
        lines += _files(_series(results["files"]["series"]))
    if plots:
        lines += ["## Plots", ""]
        lines += [f"![{title}]({file})\n" for title, file in plots]
    if "counts" in results:
        lines += _counts(results["counts"]["counts"])
    return "\n".join(lines).rstrip() + "\n"
