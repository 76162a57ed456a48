"""The operations of a target: one table for every way to reach it.

A client names an operation and gives positional arguments; the table says which of them a
provider lets through, and how the result, which crossed the wire as plain msgpack, becomes the
object that the target returned.  Bytes of regions are no arguments: they travel beside them
(``write``, ``create_and_write``, ``read``).

How a target carries them out is in ``calls.py``, which a client does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from warabi import migration
from warabi.answers import Opened, RegionStat, Verified
from warabi.errors import ProtocolError
from warabi.inode import Attributes
from warabi.region import RegionID
from warabi.security import Access

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


def _opened(value: Any) -> Opened:
    attributes, version = value
    return Opened(Attributes(*attributes), version)


def _verified(value: Any) -> Verified:
    return Verified(*value)


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation.

    Attributes:
        arguments: a letter for each: ``r`` region, ``i`` integer, ``I`` integer or None,
            ``b`` bytes, ``s`` text, ``?`` truth value.
        access: what it takes to be let; it is asked for with ``security.permit``.
        waits: whether it may wait for the medium, and so keep an event loop waiting.
        decode: turns the result's msgpack form into what the target returned.
        data: ``in`` when bytes of regions travel with the request, as the last argument of
            the call; ``out`` when they travel with the reply, that argument being their place.
        pins: the inode, and by how much, that the result pinned for the caller.
    """

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


READ, CHANGE = Access.READ, Access.CHANGE

OPERATIONS: dict[str, Operation] = {
    # Regions; a client sends write, create_and_write and read through methods of their own.
    "create": Operation("i", CHANGE, decode=RegionID),
    "erase": Operation("r", CHANGE),
    "resize": Operation("ri", CHANGE, waits=True),
    "size": Operation("r", READ),
    "stat": Operation("r", READ, decode=_stat),
    "list": Operation(
        "ri",
        READ,
        decode=_regions,
    ),
    "persist": Operation("rii", READ, waits=True),
    "write_vector": Operation(
        "rb?",
        CHANGE,
        waits=True,
        data="in",
    ),
    "read_vector": Operation(
        "rb",
        READ,
        waits=True,
        data="out",
    ),
    "persist_vector": Operation(
        "rb",
        READ,
        waits=True,
    ),
    "fsync": Operation("r?", READ, waits=True),
    "commit": Operation("", READ, waits=True),
    "sync": Operation("", READ, waits=True),
    "room": Operation("", READ, decode=tuple),
    "uuid": Operation("", READ),
    "epoch": Operation("", READ),
    "used": Operation("", READ),
    "summed": Operation("", READ),
    "verify": Operation("rii", READ, waits=True, decode=_verified),
    "update": Operation("r", CHANGE, waits=True),
    "survey": Operation("", CHANGE, waits=True, decode=_attributes, pins=_pinned),
    "copy": Operation("r", CHANGE, waits=True, decode=_attributes, pins=_pinned),
    "adopt": Operation("ri", CHANGE, waits=True, decode=_attributes, pins=_pinned),
    "graft": Operation("r", CHANGE, waits=True),
    # Names
    "lookup": Operation("ib", READ, decode=_attributes),
    "getattr": Operation("i", READ, decode=_attributes),
    "setattr": Operation("iIIIII", CHANGE, decode=_attributes),
    "pin": Operation("i", READ, decode=_attributes, pins=lambda args, result: (args[0], 1)),
    "open": Operation("i", READ, decode=_opened, pins=lambda args, result: (args[0], 1)),
    "unpin": Operation("ii", READ, pins=lambda args, result: (args[0], -args[1])),
    "mknod": Operation("ibiiii?i", CHANGE, decode=_attributes, pins=_pinned_if(6)),
    "mkdir": Operation("ibiiii", CHANGE, decode=_attributes),
    "symlink": Operation("ibbii", CHANGE, decode=_attributes),
    "readlink": Operation("i", READ),
    "link": Operation("iib", CHANGE, decode=_attributes),
    "unlink": Operation("ib?", CHANGE, decode=_attributes, pins=_held_if(2)),
    "rmdir": Operation("ib?", CHANGE, decode=_attributes, pins=_held_if(2)),
    "rename": Operation("ibibi?", CHANGE, decode=_optional_attributes, pins=_held_if(5)),
    "readdir": Operation(
        "ibi",
        READ,
        decode=_entries,
    ),
    "getxattr": Operation("ib", READ),
    "setxattr": Operation("ibb?", CHANGE),
    "removexattr": Operation("ib", CHANGE),
    "listxattr": Operation("i", READ),
    "resolve": Operation("s", READ, decode=_attributes),
    "open_name": Operation("s", READ, decode=RegionID),
    "link_name": Operation("rs", CHANGE),
    "unlink_name": Operation("s", CHANGE),
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

_TYPES: dict[str, tuple[type, ...]] = {
    "i": (int,),
    "I": (int, type(None)),
    "b": (bytes,),
    "s": (str,),
    "?": (bool,),
}
"""What the values on the wire are, exactly."""


def checked_arguments(name: str, letters: str, arguments: Any) -> list[Any]:
    """Arguments from the wire, regions as ``RegionID``.

    Raises:
        ProtocolError: not as many, or not of the types, that *letters* say.
    """
    if not isinstance(arguments, list) or len(arguments) != len(letters):
        raise ProtocolError(f"{name}: expected {len(letters)} arguments")
    checked = arguments.copy()
    for index, letter in enumerate(letters):
        value = arguments[index]
        kind = type(value)
        if letter == "r":
            if kind is not bytes or len(value) != 16:
                raise ProtocolError(f"{name}: {value!r:.100} is no region ID")
            checked[index] = RegionID(value)
        elif kind not in _TYPES[letter]:
            raise ProtocolError(f"{name}: an argument of type {kind.__name__}")
        elif kind is int and not -(1 << 63) <= value < 1 << 63:
            raise ProtocolError(f"{name}: the number {value} is out of range")
    return checked
