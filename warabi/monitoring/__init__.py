"""Monitoring of a provider's or a mount's process over HTTP: metrics, and a status page."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from warabi._core import extras
from warabi._core.counters import Totals
from warabi.monitoring.history import History
from warabi.monitoring.http import HttpServer, Page
from warabi.protocol.auth import Security

log = logging.getLogger(__name__)


@contextmanager
def monitored(
    report: Callable[[], dict[str, Any]],
    totals: Callable[[], Iterable[Totals]],
    security: Security,
    *,
    metrics: str | None = None,
    http: str | None = None,
    spelling: str = "--{} ",
) -> Iterator[None]:
    """Serve what is asked for, for the duration of the block.

    Args:
        report: returns a report of an engine or a mount; called in threads.
        totals: returns the counters of all operations, in parts; called in a thread.
        security: what is required of peers.
        metrics: where the metrics for Prometheus are served, ``HOST:PORT``; None for nowhere.
        http: where the status page is served.
        spelling: how the options are spelled, for messages.

    Raises:
        ConfigError: a place is malformed, or it cannot listen there; or a package is missing.
        PermissionDenied: a place is beyond loopback, and neither TLS nor ``insecure`` is set.
    """
    places: dict[str, tuple[str, dict[str, Page]]] = {}
    if metrics is not None:
        module = extras.load("warabi.monitoring.prometheus", "metrics")
        pages = places.setdefault(metrics, (spelling.format("metrics"), {}))[1]
        pages["/metrics"] = module.page(report)
    history = History(totals)
    if http is not None:
        module = extras.load("warabi.monitoring.page", "metrics")
        pages = places.setdefault(http, (spelling.format("http"), {}))[1]
        pages["/"] = module.page(report, history)
    with ExitStack() as stack:
        for where, (option, pages) in places.items():
            server = HttpServer(option, where, security, pages, tick=history.tick)
            stack.callback(server.close)
            for path in pages:
                log.info("serving %s%s", server.url, path)
        yield
