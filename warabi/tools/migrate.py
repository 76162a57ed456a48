"""Requesting a running provider to migrate its target."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from warabi._core.tuning import MIGRATION_PROGRESS
from warabi.client import Client
from warabi.engine import Engine
from warabi.protocol.address import parse


def ask(
    engine: Engine,
    source: tuple[str, int],
    destination: tuple[str, int],
    options: dict[str, Any],
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Request the provider *source* to migrate its target to *destination*, and wait for the end.

    If this process ends, the migration continues.

    Args:
        engine: this process's engine.
        source: address and provider ID.
        destination: address, as the source can reach it, and provider ID.
        options: as for ``Provider.migrate_target``; paths are the destination's.
        progress: called with the bytes of regions transferred, and the total.

    Raises:
        As ``Provider.migrate_target``, and ``PermissionDenied`` if the source does not allow it.
    """
    link = Client(engine).make_target_handle(*source).link
    where = (str(parse(destination[0])), destination[1])
    [request] = link.start("migrate", *where, json.dumps(options))
    seen = (0, 0)
    while not request.done:
        found = tuple(link.call("migration_progress"))
        if not request.done and found != seen:
            progress(*(seen := found))
        if not request.done:
            time.sleep(MIGRATION_PROGRESS)
        link.poll(request)
    link.finish([request])
