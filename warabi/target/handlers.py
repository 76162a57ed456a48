"""Maps each operation of ``protocol/operations.py`` to the method of a target that executes it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

from warabi._core.extents import unpack
from warabi._core.results import RegionStat
from warabi.errors import InvalidRegion
from warabi.metadata.namespace import Namespace
from warabi.protocol.operations import OPERATIONS, PAGE, Served
from warabi.region import RegionID
from warabi.target.extents import (
    allocate,
    clone,
    copy_range,
    punch_hole,
    seek,
    zero_range,
)
from warabi.target.graft import adopt, graft
from warabi.target.named_files import fetch
from warabi.target.snapshot import copy, survey
from warabi.target.target import Target
from warabi.target.verify import summed, update, verify

_NAMES = 64 * 1024
"""Approximate limit on characters of names in one reply, which has at most 1 MiB."""
_COMPONENTS = 2000
"""Approximate limit on path components in one reply: finding each takes some µs."""
_STATS = 250
"""Regions with names in one reply, each of which takes some time."""


def _stat_with_some_names(target: Target, region: RegionID) -> RegionStat:
    return target.stat(region, PAGE, _NAMES)


def _list_stats(target: Target, after: RegionID, limit: int) -> list[tuple[RegionID, RegionStat]]:
    """The same as ``list``, with the result of ``stat`` for each; empty only if no region is
    left."""
    length, components, found = 0, 0, []
    while regions := target.list(after, min(limit, _STATS)):
        for region in regions:
            with contextlib.suppress(InvalidRegion):  # erased meanwhile
                known = _stat_with_some_names(target, region)
                found.append((region, known))
                length += sum(map(len, known.names))
                components += sum(name.count("/") for name in known.names)
                if length > _NAMES or components > _COMPONENTS:
                    return found
        if found:
            break
        after = regions[-1]
    return found


def _names(method: str) -> Callable[..., Any]:
    function = getattr(Namespace, method)
    return lambda target, *args: function(target.namespace, *args)


_CALLS: dict[str, Callable[..., Any]] = {
    "create": Target.create,
    "erase": Target.erase,
    "resize": Target.resize,
    "set_flags": Target.set_flags,
    "allocate": allocate,
    "zero_range": zero_range,
    "punch_hole": punch_hole,
    "seek": seek,
    "copy_range": copy_range,
    "clone": clone,
    "size": Target.size,
    "stat": _stat_with_some_names,
    "list": lambda target, after, limit: target.list(after, min(limit, PAGE)),
    "list_stats": _list_stats,
    "persist": Target.persist,
    "write_vector": lambda target, region, packed, persist, data: target.write_vector(
        region, unpack(packed, "write_vector"), data, persist
    ),
    "read_vector": lambda target, region, packed, place: target.read_vector(
        region, unpack(packed, "read_vector"), place
    ),
    "persist_vector": lambda target, region, packed: target.persist_vector(
        region, unpack(packed, "persist_vector")
    ),
    "fsync": Target.fsync,
    "commit": Target.commit,
    "sync": Target.sync,
    "room": Target.room,
    "uuid": lambda target: target.uuid,
    "epoch": lambda target: target.epoch,
    "used": lambda target: target.used,
    "fetch": fetch,
    "summed": summed,
    "verify": verify,
    "update": update,
    "survey": survey,
    "copy": copy,
    "adopt": adopt,
    "graft": graft,
    "readdir": lambda target, ino, after, limit: target.namespace.readdir(
        ino, after, min(limit, PAGE)
    ),
}
"""Operations that are not methods of a target's namespace."""

_METHODS = tuple(
    name
    for name, operation in OPERATIONS.items()
    if operation.served is Served.TARGET and name not in _CALLS
)

CALLS = {**_CALLS, **{method: _names(method) for method in _METHODS}}
"""By name: the function to call with a target and the arguments."""


def bound(target: Target) -> dict[str, Callable[..., Any]]:
    """Return the operations bound to one target."""
    calls: dict[str, Callable[..., Any]] = {
        name: partial(call, target) for name, call in CALLS.items()
    }
    for method in _METHODS:
        calls[method] = getattr(target.namespace, method)
    return calls
