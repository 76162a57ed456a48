"""Reports of the state of a process, and of one provider: what monitoring shows.

A report is a dict that JSON can have.  Making one asks the file system for its free space, and
takes locks of the target, so it is made in a thread.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import warabi
from warabi import errors
from warabi._core.counters import Counters

if TYPE_CHECKING:
    from warabi.provider.core import ProviderCore
    from warabi.target.target import Target

MOST_CLIENTS = 200
"""Clients that a report names, longest connected first."""
_STARTED = time.time()


def process_report() -> dict[str, Any]:
    """Return the state of this process: version, ``pid``, ``started`` (seconds since the epoch),
    ``time`` (now), ``cpu_seconds``, ``resident_bytes``, ``open_fds``, ``max_fds`` and
    ``threads``."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * resource.getpagesize()
    return {
        "version": warabi.__version__,
        "python": sys.version.split()[0],
        "pid": os.getpid(),
        "started": _STARTED,
        "time": time.time(),
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "resident_bytes": resident,
        "open_fds": len(os.listdir("/proc/self/fd")) - 1,  # that of the listing
        "max_fds": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "threads": threading.active_count(),
    }


def counters_report(counters: Counters) -> dict[str, Any]:
    """Return ``operations`` (:meth:`Counters.snapshot`), ``slowest`` and ``failures``."""
    return {
        "operations": counters.snapshot(),
        "slowest": [slow._asdict() for slow in counters.slowest()],
        "failures": [failure._asdict() for failure in list(counters.failures)],
    }


def target_report(target: Target) -> dict[str, Any]:
    """Return the state of a target: ``uuid``, ``regions``, and in bytes ``used`` (the sum of their
    sizes), ``total``, ``available`` and ``quota`` (None: none); further numbers of its storage.

    Raises:
        warabi.errors.Exception: it is closed, or its storage failed.
    """
    total, available, regions = target.room()
    return {
        "uuid": target.uuid,
        "regions": regions,
        "used": target.used,
        "total": total,
        "available": available,
        "quota": target.sizes.capacity,
        **target.state.storage.statistics(),
    }


def provider_report(core: ProviderCore) -> dict[str, Any]:
    """Return the state of a provider: ``provider_id``, ``type`` and ``path`` of its target, whether
    a ``migration`` is under way, the ``target`` itself (:func:`target_report`), or None and why it
    has none (``error``), and its counters (:func:`counters_report`)."""
    settings = core.config.target
    found: dict[str, Any] = {
        "provider_id": core.provider_id,
        "type": settings.type if settings is not None else None,
        "path": settings.path if settings is not None else None,
        "migration": core.receiving is not None
        or (core.sending is not None and not core.sending.ended),
        "target": None,
        "error": None,
        **counters_report(core.counters),
    }
    try:
        found["target"] = target_report(core.target)
    except (errors.Exception, OSError) as error:
        found["error"] = str(error)
    return found
