"""``warabi stats`` and ``warabi top``: the counters of a provider or a mount."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from warabi._core.attributes import FIRST_REPORT
from warabi._core.counters import quantile
from warabi._core.units import shown_bytes, shown_seconds
from warabi.errors import ConfigError
from warabi.tools.cli.common import (
    LOCATION,
    echo,
    flush_output,
    locating,
    print_json,
    print_lines,
)
from warabi.tools.quoting import printable
from warabi.tools.trees import Trees

_FILE = ".stats"
_COLUMNS = ("operation", "count", "errors", "bytes", "mean", "median", "99 %")
_NARROW = ("operation", "count", "mean")
_WIDE = 76
"""Columns of a terminal from which all columns of the table fit."""


@click.command()
@locating(read_only=True)
@click.argument("source", metavar="[LOCATION]", default=":", type=LOCATION)
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as JSON.")
def stats(trees: Trees, source: str, as_json: bool) -> None:
    """Print the counters of a provider, or of the mount that has the path LOCATION.

    For each operation: how many requests, failed ones and bytes, and how long they took.  The path
    may also be the mount's file of counters, .stats unless the option stats= names another.
    """
    report = _report(trees, source)
    lines = json.dumps(report, indent=1).splitlines() if as_json else _shown(_lines(report), source)
    print_lines([os.fsencode(line) for line in lines])


@click.command()
@locating(read_only=True)
@click.argument("source", metavar="[LOCATION]", default=":", type=LOCATION)
@click.option("-i", "--interval", type=click.FloatRange(0.1, 3600), default=2.0, show_default=True,
              metavar="SECONDS", help="How often it is shown.")  # fmt: skip
@click.option(
    "-n", "--count", type=click.IntRange(min=1), help="How often; by default until Ctrl-C."
)
@click.option("--json", "as_json", is_flag=True, help="Print what each interval brought, as JSON.")
def top(trees: Trees, source: str, interval: float, count: int | None, as_json: bool) -> None:
    """Show what a provider, or the mount that has the path LOCATION, is doing now.

    As `warabi stats`, of what happened since the last time: requests and bytes per second, and how
    long they took, those that took longest first.  On a terminal it fills the screen.
    """
    screen = not as_json and sys.stdout is not None and sys.stdout.isatty()
    before = _report(trees, source)
    with _whole_screen() if screen else contextlib.nullcontext():
        for _ in range(count) if count else itertools.count():
            time.sleep(interval)
            now = _report(trees, source)
            change = _since(before, now)
            before = now
            if as_json:
                print_json(change)
                continue
            lines = _shown(_lines(change, now["time"] - change["time"]), source)
            if screen:
                columns, rows = shutil.get_terminal_size()
                clipped = [line[:columns] for line in lines[: rows - 1]]
                print_lines([b"\x1b[H\x1b[J", *map(os.fsencode, clipped)], end=b"\r\n")
                flush_output()
            else:
                echo("\n".join([*lines, ""]))


@contextlib.contextmanager
def _whole_screen() -> Iterator[None]:
    """Use the terminal's other screen, so that what was there is there again afterwards."""
    print_lines([b"\x1b[?1049h"], end=b"")
    try:
        yield
    finally:
        print_lines([b"\x1b[?1049l"], end=b"")


def _since(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the report *now* with the operations since that of *before*, whose time it has."""
    targets = {one["provider_id"]: one for one in before["targets"]}
    change = {**now, "time": before["time"], "targets": []}
    for one in now["targets"]:
        old = targets.get(one["provider_id"], {})
        change["targets"].append(_changed(old, one))
    return _changed(before, change)


def _changed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    if "operations" not in now:
        return now
    operations = {}
    for name, one in now["operations"].items():
        old = before.get("operations", {}).get(name)
        if old is None:
            operations[name] = one
        elif one["count"] > old["count"]:
            had = dict(old["buckets"])
            operations[name] = {
                "errors": {kind: number - old["errors"].get(kind, 0)
                           for kind, number in one["errors"].items()},
                "buckets": [[bound, number - had.get(bound, 0)]
                            for bound, number in one["buckets"]],
                **{key: one[key] - old[key] for key in ("count", "seconds", "bytes")},
            }  # fmt: skip
    return {**now, "operations": operations}


def _report(trees: Trees, source: str) -> dict[str, Any]:
    """Return the report of the mount or the provider that *source* leads to."""
    if os.path.lexists(source):
        text = _read(Path(source))
    else:
        text = trees.target(source)[0].target.link.call("stats")
    with _of_a_report(source):
        report: dict[str, Any] = json.loads(text)
        return report


@contextlib.contextmanager
def _of_a_report(source: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{source}: is no report of a mount or a provider") from None


def _shown(lines: Iterator[str], source: str) -> list[str]:
    with _of_a_report(source):
        return [printable(line) for line in lines]


def _read(path: Path) -> str:
    if path.stat().st_ino >= FIRST_REPORT:
        return path.read_text(encoding="utf-8")
    root = path.resolve()
    while not os.path.ismount(root):
        root = root.parent
    try:
        return (root / _FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: is on no mount of warabifs with a file {_FILE}; expected an address, such as"
            " na+sm://123-0, or a path on a mount"
        ) from None


def _lines(report: dict[str, Any], seconds: float = 0) -> Iterator[str]:
    """Yield the lines for people; counts and bytes per second if they are those of *seconds*."""
    what = report["address"] if report["kind"] == "engine" else report["mountpoint"]
    up = shown_seconds(report["time"] - report["started"])
    yield f"{report['kind']} {what}: version {report['version']}, up {up}"
    if report["kind"] == "mount":
        yield f"  source {report['source']}, front end {report['front_end']}"
    else:
        connections = report["connections"]
        yield f"  connections: {connections['open']} open, {connections['accepted']} so far"
    yield (
        f"  process {report['pid']}: {shown_bytes(report['resident_bytes'])},"
        f" {shown_seconds(report['cpu_seconds'])} of CPU,"
        f" {report['open_fds']} of {report['max_fds']} descriptors"
    )
    for target in report["targets"]:
        yield from _target(target)
        if "operations" in target:
            yield from _table(target["operations"], seconds)
    if report["kind"] == "mount":
        yield from _table(report["operations"], seconds)


def _target(target: dict[str, Any]) -> Iterator[str]:
    number = target["provider_id"]
    name = "target" if number is None else f"provider {number}"
    kind = " ".join(filter(None, (target["type"], target["path"])))
    yield f"{name}: {kind}" if kind else name
    state = target["target"]
    if state is None:
        yield f"  {target['error']}"
        return
    yield f"  UUID {state['uuid']}"
    yield (
        f"  regions: {state['regions']}, {shown_bytes(state['used'])};"
        f" {shown_bytes(state['available'])} available"
    )


def _table(operations: dict[str, Any], seconds: float) -> Iterator[str]:
    """Yield a table of operations, those that took longest first."""
    narrow = sys.stdout is not None and sys.stdout.isatty()
    narrow = narrow and shutil.get_terminal_size().columns < _WIDE
    columns = _NARROW if narrow else _COLUMNS
    rows: list[tuple[str, ...]] = [columns]
    for name, one in sorted(operations.items(), key=lambda item: -item[1]["seconds"]):
        count, buckets = one["count"], one["buckets"]
        size, per = one["bytes"] / (seconds or 1), "/s" if seconds else ""
        cells = {
            "operation": name,
            "count": f"{count / (seconds or 1):.0f}{per}",
            "errors": str(sum(one["errors"].values())),
            "bytes": f"{shown_bytes(size)}{per}" if size else "",
            "mean": shown_seconds(one["seconds"] / count) if count else "",
            "median": shown_seconds(quantile(buckets, 0.5)) if count else "",
            "99 %": shown_seconds(quantile(buckets, 0.99)) if count else "",
        }
        rows.append(tuple(cells[column] for column in columns))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows if len(rows) > 1 else []:
        shown = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        yield f"  {first:<{widths[0]}}  {'  '.join(shown)}"
