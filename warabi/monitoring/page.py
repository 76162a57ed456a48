"""The status page: one HTML page, made from a report whenever it is asked for.

It needs no JavaScript; with it, a script of a few lines replaces the contents with those of a new
page every two seconds.  Names, paths and messages come from peers and files.  The template escapes
whatever it shows, and the page's security policy allows no script and style but its own.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import resources
from itertools import islice
from typing import Any, NamedTuple
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import jinja2
from markupsafe import Markup

from warabi._core import mountinfo
from warabi._core.counters import quantile
from warabi._core.units import shown_bytes, shown_seconds
from warabi.monitoring.history import History

Report = dict[str, Any]

_MOST = {
    "targets": 120, "clients": 50, "operations": 60, "slowest": 20, "failures": 20, "mounts": 30,
}  # fmt: skip
"""Rows of each table; the page says how many more there are."""
_LONGEST = 120
"""Characters of a text that are shown."""
_WIDTH, _HEIGHT = 300, 60
"""Size of a plot, in its own units."""


class Table(NamedTuple):
    """Rows that are shown, and the number of further ones."""

    rows: list[dict[str, Any]]
    more: int


class Plot(NamedTuple):
    """A plot of values over time, latest at the right.

    Attributes:
        line: points, as SVG takes them: digits, commas and blanks.
        now: the latest value, for people.
        most: the largest value, for people.
    """

    line: Markup
    now: str
    most: str


def _table(name: str, rows: Iterable[dict[str, Any]], count: int) -> Table:
    most = _MOST[name]
    return Table(list(islice(rows, most)), max(0, count - most))


def _short(value: Any) -> Any:
    """Shorten a text that is to be shown; anything else is returned unchanged, but for None."""
    if type(value) is str and len(value) > _LONGEST:
        return f"{value[: _LONGEST - 1]}…"
    return "" if value is None else value


def _plot(values: list[float], unit: Callable[[float], str]) -> Plot:
    most = max(values, default=0.0)
    step, scale = _WIDTH / max(1, len(values) - 1), (_HEIGHT - 2) / (most or 1.0)
    points = (f"{i * step:.0f},{_HEIGHT - 1 - v * scale:.0f}" for i, v in enumerate(values))
    return Plot(Markup(" ".join(points)), unit(values[-1] if values else 0.0), unit(most))


def _count(number: float) -> str:
    return f"{number:.0f}" if number >= 10 or number == int(number) else f"{number:.1f}"


def _operations(counters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add up the counters of several targets; what took longest in all comes first."""
    added: dict[str, dict[str, Any]] = {}
    for operations in counters:
        for name, one in operations.items():
            row = added.setdefault(
                name, {"name": name, "count": 0, "seconds": 0.0, "bytes": 0, "errors": 0,
                       "buckets": {}},
            )  # fmt: skip
            for key in ("count", "seconds", "bytes"):
                row[key] += one[key]
            row["errors"] += sum(one["errors"].values())
            for bound, count in one["buckets"]:
                row["buckets"][bound] = row["buckets"].get(bound, 0) + count
    for row in added.values():
        buckets = sorted(row["buckets"].items())
        row["mean"] = row["seconds"] / max(1, row["count"])
        row["median"], row["slow"] = quantile(buckets, 0.5), quantile(buckets, 0.99)
    return sorted(added.values(), key=lambda row: -row["seconds"])


def _mounts(address: str) -> list[dict[str, Any]]:
    """Return the mounts of this host whose source is the engine."""
    return [
        {"path": mount.path, "source": mount.source, "owner": mount.owner}
        for mount in mountinfo.mounts()
        if mount.kind == mountinfo.KIND and mount.source == address
    ]


def _target(one: dict[str, Any]) -> dict[str, Any]:
    operations = one.get("operations", {}).values()
    return {
        **one,
        "requests": sum(operation["count"] for operation in operations),
        "failed": sum(sum(operation["errors"].values()) for operation in operations),
    }


def _events(parts: list[dict[str, Any]], key: str) -> Iterator[dict[str, Any]]:
    for part in parts:
        for event in part[key]:
            yield {**event, "provider": part.get("provider_id")}


def values_of(report: Report, history: History) -> dict[str, Any]:
    """Return what the template shows of a report."""
    parts = [report] if report["kind"] == "mount" else report["targets"]
    operations = _operations([part["operations"] for part in parts])
    slowest = sorted(_events(parts, "slowest"), key=lambda slow: -slow["seconds"])
    failures = sorted(_events(parts, "failures"), key=lambda failure: -failure["time"])
    clients = report.get("clients", [])
    mounts = _mounts(report["address"]) if report["kind"] == "engine" else []
    rates = history.rates()
    return {
        "report": report,
        "plots": {
            "operations": _plot([rate.operations for rate in rates], _count),
            "bytes": _plot([rate.size for rate in rates], shown_bytes),
            "failures": _plot([rate.failures for rate in rates], _count),
        },
        "targets": _table("targets", map(_target, report["targets"]), len(report["targets"])),
        "clients": _table("clients", clients, report.get("connections", {}).get("open", 0)),
        "operations": _table("operations", operations, len(operations)),
        "slowest": _table("slowest", slowest, 0),
        "failures": _table("failures", failures, 0),
        "mounts": _table("mounts", mounts, len(mounts)),
        "now": report["time"],
    }


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _own(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


class StatusPage:
    """Renders reports.

    Args:
        history: for the plots.
    """

    def __init__(self, history: History) -> None:
        self._history = history
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
            finalize=_short,
        )  # fmt: skip
        environment.filters.update(size=shown_bytes, duration=shown_seconds, clock=_clock)
        style, script = _own("status.css"), _own("status.js")
        # Beside the points of plots the only texts that are not escaped: two files of ours.
        environment.globals.update(style=Markup(style), script=Markup(script))
        self._template = environment.from_string(_own("status.html"))
        self.headers = [
            ("Content-Type", "text/html; charset=utf-8"),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            (
                "Content-Security-Policy",
                f"default-src 'none'; style-src 'sha256-{_hash(style)}'; script-src"
                f" 'sha256-{_hash(script)}'; connect-src 'self'; img-src data:; base-uri 'none';"
                " form-action 'none'; frame-ancestors 'none'",
            ),
        ]

    def render(self, report: Report) -> str:
        """Return the page for a report of an engine or a mount."""
        return self._template.render(values_of(report, self._history))


def page(report: Callable[[], Report], history: History) -> WSGIApplication:
    """Return the status page of the process that *report* is about."""
    status = StatusPage(history)

    def answer(environ: WSGIEnvironment, start: StartResponse) -> list[bytes]:
        text = status.render(report()).encode("utf-8", "replace")
        start("200 OK", list(status.headers))  # which the server changes
        return [text]

    return answer
