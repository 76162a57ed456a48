"""``warabi stats``: the counters of a provider or a mount."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from warabi._core.attributes import FIRST_REPORT
from warabi._core.counters import quantile
from warabi._core.units import shown_bytes, shown_seconds
from warabi.errors import ConfigError
from warabi.tools.cli.common import LOCATION, locating, print_lines
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
    if os.path.lexists(source):
        text = _read(Path(source))
    else:
        text = trees.target(source)[0].target.link.call("stats")
    try:
        report = json.loads(text)
        lines = json.dumps(report, indent=1).splitlines() if as_json else list(_lines(report))
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{source}: is no report of a mount or a provider") from None
    print_lines([os.fsencode(line if as_json else printable(line)) for line in lines])


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


def _lines(report: dict[str, Any]) -> Iterator[str]:
    """Yield the lines for people."""
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
            yield from _table(target["operations"])
    if report["kind"] == "mount":
        yield from _table(report["operations"])


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


def _table(operations: dict[str, Any]) -> Iterator[str]:
    """Yield a table of operations, those that took longest first."""
    narrow = sys.stdout is not None and sys.stdout.isatty()
    narrow = narrow and shutil.get_terminal_size().columns < _WIDE
    columns = _NARROW if narrow else _COLUMNS
    rows: list[tuple[str, ...]] = [columns]
    for name, one in sorted(operations.items(), key=lambda item: -item[1]["seconds"]):
        count, buckets = one["count"], one["buckets"]
        cells = {
            "operation": name,
            "count": str(count),
            "errors": str(sum(one["errors"].values())),
            "bytes": shown_bytes(one["bytes"]) if one["bytes"] else "",
            "mean": shown_seconds(one["seconds"] / count) if count else "",
            "median": shown_seconds(quantile(buckets, 0.5)) if count else "",
            "99 %": shown_seconds(quantile(buckets, 0.99)) if count else "",
        }
        rows.append(tuple(cells[column] for column in columns))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows if len(rows) > 1 else []:
        shown = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        yield f"  {first:<{widths[0]}}  {'  '.join(shown)}"
