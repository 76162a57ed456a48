"""Asking a running provider to migrate its target."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from warabi.client import Client
from warabi.engine import Engine
from warabi.protocol.address import parse

_INTERVAL = 0.1  # seconds between two looks at the progress


def ask(
    engine: Engine,
    source: tuple[str, int],
    destination: tuple[str, int],
    options: dict[str, Any],
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Have the provider *source* migrate its target to *destination*, and return when it has.

    When this process goes away meanwhile, the migration goes on.

    Args:
        engine: this process's.
        source: address and provider ID.
        destination: address, as the source can reach it, and provider ID.
        options: as ``Provider.migrate_target`` takes them; paths are the destination's.
        progress: called with the bytes of regions that the destination has, and those of all.

    Raises:
        As ``Provider.migrate_target``, and ``PermissionDenied`` when the source does not do this
        for this process.
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
            time.sleep(_INTERVAL)
        link.poll(request)
    link.wait(request)
