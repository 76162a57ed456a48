"""The operations of a target: one table for every way to reach it.

A client names an operation and gives positional arguments; the table says how a target
carries it out, which arguments a provider lets through, and how the result, which crossed the
wire as plain msgpack, becomes the object that the target returned.  Bytes of regions are no
arguments: they travel beside them (``write``, ``create_and_write``, ``read``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from warabi import migration
from warabi.backup.graft import adopt, graft
from warabi.backup.survey import copy, survey
from warabi.errors import ProtocolError
from warabi.extents import unpack
from warabi.inode import Attributes
from warabi.namespace import Namespace
from warabi.region import RegionID
from warabi.security import Access
from warabi.target import RegionStat, Target
from warabi.verify import Verified, summed, update, verify

PAGE = 1000
"""Most entries of a list in one reply."""


def _same(value: Any) -> Any:
    return value


def _attributes(value: Any) -> Attributes:
    return Attributes(*value)


def _optional_attributes(value: Any) -> Attributes | None:
    return None if value is None else Attributes(*value)


def _entries(value: Any) -> list[tuple[bytes, Attributes]]:
    return [(name, Attributes(*attributes)) for name, attributes in value]


def _regions(value: Any) -> list[RegionID]:
    return [RegionID(item) for item in value]


def _stat(value: Any) -> RegionStat:
    return RegionStat(*value)


def _stat_with_some_names(target: Target, region: RegionID) -> RegionStat:
    found = target.stat(region)
    return found._replace(names=found.names[:PAGE])


def _verified(value: Any) -> Verified:
    return Verified(*value)


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation.

    Attributes:
        call: carries it out on a target.
        arguments: a letter for each: ``r`` region, ``i`` integer, ``I`` integer or None,
            ``b`` bytes, ``s`` text, ``?`` truth value.
        access: what it takes to be let; it is asked for with ``security.permit``.
        waits: whether it may wait for the medium, and so keep an event loop waiting.
        decode: turns the result's msgpack form into what *call* returned.
        data: ``in`` when bytes of regions travel with the request, as the last argument of
            *call*; ``out`` when they travel with the reply, that argument being their place.
        pins: the inode, and by how much, that the result pinned for the caller.
    """

    call: Callable[..., Any]
    arguments: str
    access: Access
    waits: bool = False
    decode: Callable[[Any], Any] = _same
    data: Literal["", "in", "out"] = ""
    pins: Callable[[Sequence[Any], Any], tuple[int, int] | None] | None = None


def _pinned_if(position: int) -> Callable[[Sequence[Any], Any], tuple[int, int] | None]:
    return lambda args, result: (result.ino, 1) if args[position] else None


def _pinned(args: Sequence[Any], result: Any) -> tuple[int, int]:
    return result.ino, 1


def _held_if(position: int) -> Callable[[Sequence[Any], Any], tuple[int, int] | None]:
    def held(args: Sequence[Any], result: Any) -> tuple[int, int] | None:
        return (result.ino, 1) if args[position] and result and result.nlink == 0 else None

    return held


def _names(method: str) -> Callable[..., Any]:
    function = getattr(Namespace, method)
    return lambda target, *args: function(target.namespace, *args)


READ, CHANGE = Access.READ, Access.CHANGE

OPERATIONS: dict[str, Operation] = {
    # Regions; a client sends write, create_and_write and read through methods of their own.
    "create": Operation(Target.create, "i", CHANGE, decode=RegionID),
    "erase": Operation(Target.erase, "r", CHANGE),
    "resize": Operation(Target.resize, "ri", CHANGE, waits=True),
    "size": Operation(Target.size, "r", READ),
    "stat": Operation(_stat_with_some_names, "r", READ, decode=_stat),
    "list": Operation(
        lambda target, after, limit: target.list(after, min(limit, PAGE)),
        "ri",
        READ,
        decode=_regions,
    ),
    "persist": Operation(Target.persist, "rii", READ, waits=True),
    "write_vector": Operation(
        lambda target, region, packed, persist, data: target.write_vector(
            region, unpack(packed, "write_vector"), data, persist
        ),
        "rb?",
        CHANGE,
        waits=True,
        data="in",
    ),
    "read_vector": Operation(
        lambda target, region, packed, place: target.read_vector(
            region, unpack(packed, "read_vector"), place
        ),
        "rb",
        READ,
        waits=True,
        data="out",
    ),
    "persist_vector": Operation(
        lambda target, region, packed: target.persist_vector(
            region, unpack(packed, "persist_vector")
        ),
        "rb",
        READ,
        waits=True,
    ),
    "fsync": Operation(Target.fsync, "r?", READ, waits=True),
    "commit": Operation(Target.commit, "", READ, waits=True),
    "sync": Operation(Target.sync, "", READ, waits=True),
    "room": Operation(Target.room, "", READ, decode=tuple),
    "uuid": Operation(lambda target: target.uuid, "", READ),
    "epoch": Operation(lambda target: target.epoch, "", READ),
    "used": Operation(lambda target: target.used, "", READ),
    "summed": Operation(summed, "", READ),
    "verify": Operation(verify, "rii", READ, waits=True, decode=_verified),
    "update": Operation(update, "r", CHANGE, waits=True),
    "survey": Operation(survey, "", CHANGE, waits=True, decode=_attributes, pins=_pinned),
    "copy": Operation(copy, "r", CHANGE, waits=True, decode=_attributes, pins=_pinned),
    "adopt": Operation(adopt, "ri", CHANGE, waits=True, decode=_attributes, pins=_pinned),
    "graft": Operation(graft, "r", CHANGE, waits=True),
    # Names
    "lookup": Operation(_names("lookup"), "ib", READ, decode=_attributes),
    "getattr": Operation(_names("getattr"), "i", READ, decode=_attributes),
    "setattr": Operation(_names("setattr"), "iIIIII", CHANGE, decode=_attributes),
    "pin": Operation(
        _names("pin"), "i", READ, decode=_attributes, pins=lambda args, result: (args[0], 1)
    ),
    "unpin": Operation(_names("unpin"), "ii", READ, pins=lambda args, result: (args[0], -args[1])),
    "mknod": Operation(_names("mknod"), "ibiiii?i", CHANGE, decode=_attributes, pins=_pinned_if(6)),
    "mkdir": Operation(_names("mkdir"), "ibiiii", CHANGE, decode=_attributes),
    "symlink": Operation(_names("symlink"), "ibbii", CHANGE, decode=_attributes),
    "readlink": Operation(_names("readlink"), "i", READ),
    "link": Operation(_names("link"), "iib", CHANGE, decode=_attributes),
    "unlink": Operation(_names("unlink"), "ib?", CHANGE, decode=_attributes, pins=_held_if(2)),
    "rmdir": Operation(_names("rmdir"), "ib?", CHANGE, decode=_attributes, pins=_held_if(2)),
    "rename": Operation(
        _names("rename"), "ibibi?", CHANGE, decode=_optional_attributes, pins=_held_if(5)
    ),
    "readdir": Operation(
        lambda target, ino, after, limit: target.namespace.readdir(ino, after, min(limit, PAGE)),
        "ibi",
        READ,
        decode=_entries,
    ),
    "getxattr": Operation(_names("getxattr"), "ib", READ),
    "setxattr": Operation(_names("setxattr"), "ibb?", CHANGE),
    "removexattr": Operation(_names("removexattr"), "ib", CHANGE),
    "listxattr": Operation(_names("listxattr"), "i", READ),
    "resolve": Operation(_names("resolve"), "s", READ, decode=_attributes),
    "open_name": Operation(_names("open_name"), "s", READ, decode=RegionID),
    "link_name": Operation(_names("link_name"), "rs", CHANGE),
    "unlink_name": Operation(_names("unlink_name"), "s", CHANGE),
}

_BESIDE = {
    "read": READ, "write": CHANGE, "create_and_write": CHANGE, "ping": READ, "shutdown": CHANGE,
    # Direct access: a connection that may not change anything is granted none to write.
    "join": READ, "grant": READ, "leave": READ, "make": CHANGE,
    "watch": READ,
    # Who may do this, and to what, is a matter of the provider's configuration, too.
    **dict.fromkeys(migration.OPERATIONS, CHANGE), "migration_progress": READ,
}  # fmt: skip
"""What is asked for by name like an operation, and is none of the table."""


def access(name: str) -> Access:
    """What the operation *name* takes.

    Raises:
        ProtocolError: there is none.
    """
    operation = OPERATIONS.get(name)
    found = operation.access if operation is not None else _BESIDE.get(name)
    if found is None:
        raise ProtocolError(f"unknown operation {name!r:.60}")
    return found


READING = frozenset({"read", *(name for name, o in OPERATIONS.items() if o.access is READ)})
"""Operations that go on while the target is being sent to another provider; the others wait.

``pin`` and ``unpin`` concern inodes without names, which stay behind.
"""

_TYPES: dict[str, Any] = {
    "i": int,
    "I": (int, type(None)),
    "b": bytes,
    "s": str,
    "?": bool,
}


def checked_arguments(name: str, letters: str, arguments: Any) -> list[Any]:
    """Arguments from the wire, regions as ``RegionID``.

    Raises:
        ProtocolError: not as many, or not of the types, that *letters* say.
    """
    if not isinstance(arguments, list) or len(arguments) != len(letters):
        raise ProtocolError(f"{name}: expected {len(letters)} arguments")
    checked = []
    for letter, value in zip(letters, arguments, strict=True):
        if letter == "r":
            if not isinstance(value, bytes) or len(value) != 16:
                raise ProtocolError(f"{name}: {value!r:.100} is no region ID")
            value = RegionID(value)
        elif not isinstance(value, _TYPES[letter]) or (letter in "iI" and isinstance(value, bool)):
            raise ProtocolError(f"{name}: an argument of type {type(value).__name__}")
        elif type(value) is int and not -(1 << 63) <= value < 1 << 63:
            raise ProtocolError(f"{name}: the number {value} is out of range")
        checked.append(value)
    return checked
