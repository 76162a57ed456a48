"""Metrics for Prometheus, made from a report whenever they are asked for.

The names of metrics, and their labels, are an interface: dashboards and alerts use them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any
from wsgiref.types import WSGIApplication

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

Report = Callable[[], dict[str, Any]]

BOUNDS = [2.0**n / 1e9 for n in range(12, 35)]
"""Upper bounds of the buckets of histograms, in seconds: 4 µs to 17 s.  The same for all, as
Prometheus needs to sum them."""

_SPACE = {
    "regions": "Number of regions of the target.",
    "used_bytes": "Sum of the sizes of the target's regions.",
    "total_bytes": "Bytes that the target's storage has in all, within the quota.",
    "available_bytes": "Bytes that are available for the target, within the quota.",
}


class ReportCollector(Collector):
    """The metrics of one process.

    Args:
        report: returns a report, of an engine or a mount.
    """

    def __init__(self, report: Report) -> None:
        self._report = report

    def collect(self) -> Iterator[Metric]:
        report = self._report()
        version = {"version": report["version"], "python": report["python"]}
        yield InfoMetricFamily("warabi_build", "Version of warabifs and Python.", version)
        yield from _targets(report["targets"])
        if report["kind"] == "mount":
            yield from _mount(report)
        else:
            yield from _engine(report)


def _targets(targets: list[dict[str, Any]]) -> Iterator[Metric]:
    up = GaugeMetricFamily("warabi_target_up", "Whether the target can be used.", labels=_PROVIDER)
    info = InfoMetricFamily("warabi_target", "What the target is.", labels=_PROVIDER)
    space = {
        name: GaugeMetricFamily(f"warabi_target_{name}", text, labels=_PROVIDER)
        for name, text in _SPACE.items()
    }
    files = GaugeMetricFamily(
        "warabi_storage_open_files", "Descriptors of region files that are kept.", labels=_PROVIDER
    )
    opens = CounterMetricFamily(
        "warabi_storage_file_opens", "Region files that had to be opened.", labels=_PROVIDER
    )
    for one in targets:
        label, state = [_label(one)], one["target"]
        up.add_metric(label, float(state is not None))
        if state is None:
            continue
        about = {"uuid": state["uuid"], "type": one["type"] or "", "path": one["path"] or ""}
        info.add_metric(label, about)
        for name, family in space.items():
            family.add_metric(label, state[name.removesuffix("_bytes")])
        if "open_files" in state:
            files.add_metric(label, state["open_files"])
            opens.add_metric(label, state["file_opens"])
    yield from (up, info, *space.values(), files, opens)


_PROVIDER = ("provider",)


def _label(target: dict[str, Any]) -> str:
    return "" if target["provider_id"] is None else str(target["provider_id"])


def _engine(report: dict[str, Any]) -> Iterator[Metric]:
    clients, connections = report["clients"], report["connections"]
    yield GaugeMetricFamily("warabi_clients", "Open connections.", connections["open"])
    yield CounterMetricFamily("warabi_connections", "Connections so far.", connections["accepted"])
    yield GaugeMetricFamily(
        "warabi_clients_with_direct_access",
        "Connections whose process reaches regions without requests.",
        sum(client["direct_access"] for client in clients),
    )
    yield GaugeMetricFamily(
        "warabi_pending_requests", "Requests under way.", sum(one["pending"] for one in clients)
    )
    rows = [((_label(one),), one["operations"]) for one in report["targets"]]
    yield from _operations("warabi", _PROVIDER, rows)


def _mount(report: dict[str, Any]) -> Iterator[Metric]:
    about = {name: report[name] for name in ("source", "mountpoint", "front_end")}
    yield InfoMetricFamily("warabi_mount", "What is mounted where.", about)
    for name, text in (
        ("open_files", "Files that programs have open."),
        ("open_directories", "Directories that programs have open."),
        ("known_inodes", "Inodes that the kernel knows."),
    ):
        yield GaugeMetricFamily(f"warabi_mount_{name}", text, report[name])
    yield from _operations("warabi_mount", (), [((), report["operations"])])


def _operations(
    prefix: str,
    labels: tuple[str, ...],
    rows: Sequence[tuple[tuple[str, ...], dict[str, dict[str, Any]]]],
) -> Iterator[Metric]:
    """Yield the counters of operations; each row has the values of *labels*."""
    labels = (*labels, "operation")
    durations = HistogramMetricFamily(
        f"{prefix}_request_duration_seconds", "Durations of requests.", labels=labels
    )
    failures = CounterMetricFamily(
        f"{prefix}_request_errors", "Requests that failed.", labels=(*labels, "error")
    )
    sizes = CounterMetricFamily(
        f"{prefix}_transferred_bytes", "Bytes of data read and written.", labels=labels
    )
    for values, operations in rows:
        for name, one in operations.items():
            durations.add_metric((*values, name), _buckets(one["buckets"]), one["seconds"])
            for kind, count in one["errors"].items():
                failures.add_metric((*values, name, kind), count)
            if one["bytes"]:
                sizes.add_metric((*values, name), one["bytes"])
    yield from (durations, failures, sizes)


def _buckets(counted: list[tuple[float, int]]) -> list[tuple[str, float]]:
    """Convert the buckets of a report to cumulative ones with ``BOUNDS``."""
    counts, index = [0] * (len(BOUNDS) + 1), 0
    for bound, count in counted:
        while index < len(BOUNDS) and bound > BOUNDS[index]:
            index += 1
        counts[index] += count
    bounds = [*map(str, BOUNDS), "+Inf"]
    return list(zip(bounds, map(float, accumulate(counts)), strict=True))


def page(report: Report) -> WSGIApplication:
    """Return a page with the metrics of *report*, and those of the process that the client library
    of Prometheus knows."""
    registry = CollectorRegistry()
    registry.register(ReportCollector(report))
    ProcessCollector(registry=registry)
    made: WSGIApplication = make_wsgi_app(registry)
    return made
