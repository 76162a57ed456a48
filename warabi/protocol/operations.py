"""The operations of a provider: one table with all properties of each operation.

A client names an operation and gives positional arguments.  The table defines the forms of the
arguments and the result, the required access, what the operation changes, whether it may be
repeated, and how it is run; every other table in this package that is keyed by operation is
derived from it.  A new operation is one entry here and one method: in ``target/handlers.py`` if the
target carries it out.

The data of regions are not arguments: they are the *payload* of a message.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from warabi.errors import ProtocolError
from warabi.protocol import change_codec, forms
from warabi.protocol.auth import RequiredAccess
from warabi.protocol.forms import (
    ATTRIBUTES,
    BYTES,
    ENTRIES,
    FETCHED,
    FLAG,
    INTEGER,
    NOTHING,
    OPENED,
    OPTIONAL_INTEGER,
    REGION,
    REGION_STAT,
    STATS,
    TEXT,
    VERIFIED,
    Form,
    list_of,
    optional,
)  # fmt: skip

PAGE = 1000
"""Most entries of a list in one reply."""


class ChangeScope(enum.Enum):
    """What an operation changes, and so what must be synced to make it durable."""

    NOTHING = enum.auto()
    NAMES = enum.auto()
    """Directory entries, or the set of regions: durable with any sync."""
    REGION = enum.auto()
    """The data or the size of the region in the argument ``region``."""
    INODE = enum.auto()
    """The attributes of an inode, possibly a region's: those in the result, if any."""
    SUMS = enum.auto()
    """The checksums of a region, which are durable when the operation returns."""
    UNNAMED = enum.auto()
    """A new region without a name, removed when the connection ends; nothing needs a sync."""
    TARGET = enum.auto()
    """The target as a whole, or the engine."""


class Syncs(enum.Enum):
    """What an operation makes durable; all but ``NOTHING`` make names durable, too."""

    NOTHING = enum.auto()
    RANGE = enum.auto()
    """A part of the region in the first argument."""
    REGION = enum.auto()
    """All of the region in the first argument."""
    NAMES = enum.auto()
    EVERYTHING = enum.auto()


class Payload(enum.Enum):
    """Whether region data are sent with an operation: the last argument of its method is the data,
    or the buffer for them."""

    NONE = enum.auto()
    UPLOAD = enum.auto()  # with the request
    DOWNLOAD = enum.auto()  # with the reply


class Served(enum.Enum):
    """The part of a provider that carries out an operation."""

    TARGET = enum.auto()  # a function of ``calls.CALLS``
    TRANSFER = enum.auto()  # separate methods of links and sessions
    ENGINE = enum.auto()  # ``provider/session.py`` itself
    LOCKS = enum.auto()  # ``local/locking.py``
    DIRECT_ACCESS = enum.auto()  # ``provider/direct_access.py``
    MIGRATION = enum.auto()  # ``provider/migration/exchange.py``


Pins = Callable[[Sequence[Any], Any], tuple[int, int] | None]


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation.

    Attributes:
        arguments: the form of each argument by name, in order.
        result: the form of the result.
        access: the required access, checked with ``auth.permit``.
        changes: what it changes.  Operations that change anything wait during a migration.
        payload: whether region data are sent with it.
        repeatable: whether a client may send it again, on another connection, if the reply was lost
            and it is unknown whether it took effect.  It may only read, or set what it has set; an
            operation that can fail because of its own first effect must not be.
        syncs: what it makes durable.
        waits: whether it may wait for stable storage, and so would block an event loop.
        long: whether it may compute for longer than an event loop may be held: it runs in a worker
            thread for every target.
        indefinite: whether it may wait for other clients, for any time: a reply has no deadline.
        served: what carries it out.
        pins: returns the inode that it pins for the caller, and the count, from its arguments and
            result.
        forms: the forms of *arguments*, in order.
        position: the index of each argument, by name.
    """

    arguments: Mapping[str, Form]
    result: Form
    access: RequiredAccess
    changes: ChangeScope
    payload: Payload = Payload.NONE
    repeatable: bool = False
    syncs: Syncs = Syncs.NOTHING
    waits: bool = False
    long: bool = False
    indefinite: bool = False
    served: Served = Served.TARGET
    pins: Pins | None = None
    forms: tuple[Form, ...] = field(init=False)
    position: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "forms", tuple(self.arguments.values()))
        object.__setattr__(self, "position", {name: i for i, name in enumerate(self.arguments)})

    @property
    def owner(self) -> int | None:
        """Index of the owner of the created inode among the arguments, followed by the group; None
        if the operation creates nothing, or has no owner argument."""
        creates = self.changes in (ChangeScope.NAMES, ChangeScope.UNNAMED)
        return self.position.get("uid") if creates else None


def _pinned_if(position: int) -> Pins:
    return lambda args, result: (result.ino, 1) if args[position] else None


def _pinned(args: Sequence[Any], result: Any) -> tuple[int, int]:
    return result.ino, 1


def _pinned_argument(args: Sequence[Any], result: Any) -> tuple[int, int]:
    return args[0], 1


def _held_if(position: int) -> Pins:
    def held(args: Sequence[Any], result: Any) -> tuple[int, int] | None:
        return (result.ino, 1) if args[position] and result and result.nlink == 0 else None

    return held


_READ, _CHANGE = RequiredAccess.READ, RequiredAccess.CHANGE
_UPLOAD, _DOWNLOAD = Payload.UPLOAD, Payload.DOWNLOAD
_NOTHING, _NAMES, _UNNAMED = ChangeScope.NOTHING, ChangeScope.NAMES, ChangeScope.UNNAMED
_BYTES_OF, _INODE, _TARGET = ChangeScope.REGION, ChangeScope.INODE, ChangeScope.TARGET
_TRANSFER, _ENGINE, _LOCKS = Served.TRANSFER, Served.ENGINE, Served.LOCKS
_DIRECT, _MIGRATION = Served.DIRECT_ACCESS, Served.MIGRATION
_RANGE = {"region": REGION, "offset": INTEGER, "size": INTEGER}
_LOCK = {
    "region": REGION, "flock": FLAG, "owner": INTEGER, "kind": INTEGER, "start": INTEGER,
    "end": INTEGER,
}  # fmt: skip
_ENTRY_AT = {"parent": INTEGER, "name": BYTES}
_OWNER = {"uid": INTEGER, "gid": INTEGER}

OPERATIONS: dict[str, Operation] = {
    # Regions
    "create": Operation({"size": INTEGER}, REGION, _CHANGE, _NAMES),
    "create_and_write": Operation(
        {"persist": FLAG}, REGION, _CHANGE, _NAMES, payload=_UPLOAD, served=_TRANSFER
    ),
    "write": Operation(
        {"region": REGION, "offset": INTEGER, "persist": FLAG, "extend": FLAG},
        NOTHING, _CHANGE, _BYTES_OF, payload=_UPLOAD, repeatable=True, served=_TRANSFER,
    ),
    "read": Operation(
        {**_RANGE, "eager": FLAG, "short": FLAG},
        NOTHING, _READ, _NOTHING, payload=_DOWNLOAD, repeatable=True, served=_TRANSFER,
    ),
    "write_vector": Operation(
        {"region": REGION, "extents": BYTES, "persist": FLAG},
        NOTHING, _CHANGE, _BYTES_OF, payload=_UPLOAD, repeatable=True, waits=True,
    ),
    # Not repeatable: it would append twice.
    "append": Operation(
        {"region": REGION, "persist": FLAG},
        INTEGER, _CHANGE, _BYTES_OF, payload=_UPLOAD, served=_TRANSFER,
    ),
    "read_vector": Operation(
        {"region": REGION, "extents": BYTES},
        NOTHING, _READ, _NOTHING, payload=_DOWNLOAD, repeatable=True, waits=True,
    ),
    "erase": Operation({"region": REGION}, NOTHING, _CHANGE, _NAMES),
    "resize": Operation(
        {"region": REGION, "size": INTEGER},
        NOTHING, _CHANGE, _BYTES_OF, repeatable=True, waits=True,
    ),
    "allocate": Operation(
        {**_RANGE, "keep_size": FLAG}, NOTHING, _CHANGE, _BYTES_OF, repeatable=True, waits=True
    ),
    "zero_range": Operation(
        {**_RANGE, "keep_size": FLAG}, NOTHING, _CHANGE, _BYTES_OF, repeatable=True, waits=True
    ),
    "punch_hole": Operation(_RANGE, NOTHING, _CHANGE, _BYTES_OF, repeatable=True, waits=True),
    "copy_range": Operation(
        {
            "region": REGION, "offset": INTEGER, "source": REGION, "source_offset": INTEGER,
            "size": INTEGER,
        },
        INTEGER, _CHANGE, _BYTES_OF, repeatable=True, waits=True, long=True,
    ),
    "clone": Operation(
        {"region": REGION, "persist": FLAG}, REGION, _CHANGE, _NAMES, waits=True, long=True
    ),
    "seek": Operation(
        {"region": REGION, "offset": INTEGER, "hole": FLAG},
        OPTIONAL_INTEGER, _READ, _NOTHING, repeatable=True, waits=True,
    ),
    "size": Operation({"region": REGION}, INTEGER, _READ, _NOTHING, repeatable=True),
    "stat": Operation({"region": REGION}, REGION_STAT, _READ, _NOTHING, repeatable=True),
    "list": Operation(
        {"after": REGION, "limit": INTEGER}, list_of(REGION), _READ, _NOTHING, repeatable=True
    ),
    "list_stats": Operation(
        {"after": REGION, "limit": INTEGER}, STATS, _READ, _NOTHING, repeatable=True
    ),
    # Making data durable that others wrote is not a change.
    "persist": Operation(
        _RANGE, NOTHING, _READ, _NOTHING, syncs=Syncs.RANGE, repeatable=True, waits=True
    ),
    "persist_vector": Operation(
        {"region": REGION, "extents": BYTES},
        NOTHING, _READ, _NOTHING, syncs=Syncs.RANGE, repeatable=True, waits=True,
    ),
    "fsync": Operation(
        {"region": REGION, "times": FLAG},
        NOTHING, _READ, _NOTHING, syncs=Syncs.REGION, repeatable=True, waits=True,
    ),
    "commit": Operation(
        {}, NOTHING, _READ, _NOTHING, syncs=Syncs.NAMES, repeatable=True, waits=True
    ),
    "sync": Operation(
        {}, NOTHING, _READ, _NOTHING, syncs=Syncs.EVERYTHING, repeatable=True, waits=True
    ),
    # The target
    "room": Operation({}, forms.numbers("three sizes", 3), _READ, _NOTHING, repeatable=True),
    "uuid": Operation({}, TEXT, _READ, _NOTHING, repeatable=True),
    "epoch": Operation({}, TEXT, _READ, _NOTHING, repeatable=True),
    "used": Operation({}, INTEGER, _READ, _NOTHING, repeatable=True),
    # Maintenance
    "summed": Operation({}, FLAG, _READ, _NOTHING, repeatable=True),
    "verify": Operation(
        {"region": REGION, "first": INTEGER, "count": INTEGER},
        VERIFIED, _READ, _NOTHING, repeatable=True, waits=True,
    ),
    "update": Operation({"region": REGION}, NOTHING, _CHANGE, ChangeScope.SUMS, waits=True),
    # The inodes that these create are removed with the connection, unless they get a name.
    "survey": Operation(
        {}, ATTRIBUTES, _CHANGE, _UNNAMED, repeatable=True, waits=True, long=True, pins=_pinned
    ),
    "copy": Operation(
        {"region": REGION}, ATTRIBUTES, _CHANGE, _UNNAMED, waits=True, long=True, pins=_pinned
    ),
    "adopt": Operation(
        {"region": REGION, "size": INTEGER},
        ATTRIBUTES, _CHANGE, _UNNAMED, waits=True, pins=_pinned,
    ),
    "graft": Operation(
        {"listing": REGION}, INTEGER, _CHANGE, _NAMES, waits=True, long=True
    ),
    # Names
    "lookup": Operation(_ENTRY_AT, ATTRIBUTES, _READ, _NOTHING, repeatable=True),
    "getattr": Operation({"ino": INTEGER}, ATTRIBUTES, _READ, _NOTHING, repeatable=True),
    "setattr": Operation(
        {
            "ino": INTEGER,
            "mode": OPTIONAL_INTEGER,
            "uid": OPTIONAL_INTEGER,
            "gid": OPTIONAL_INTEGER,
            "atime_ns": OPTIONAL_INTEGER,
            "mtime_ns": OPTIONAL_INTEGER,
        },
        ATTRIBUTES, _CHANGE, _INODE, repeatable=True,
    ),
    "set_flags": Operation(
        {"ino": INTEGER, "flags": INTEGER}, ATTRIBUTES, _CHANGE, _INODE, repeatable=True, waits=True
    ),
    # Pins end with the connection, and so are not changes of the target.
    "pin": Operation(
        {"ino": INTEGER}, ATTRIBUTES, _READ, _NOTHING, repeatable=True, pins=_pinned_argument
    ),
    "open": Operation(
        {"ino": INTEGER}, OPENED, _READ, _NOTHING, repeatable=True, pins=_pinned_argument
    ),
    "unpin": Operation(
        {"ino": INTEGER, "count": INTEGER}, NOTHING, _READ, _NOTHING, repeatable=True,
        pins=lambda args, result: (args[0], -args[1]),
    ),
    "mknod": Operation(
        {**_ENTRY_AT, "mode": INTEGER, **_OWNER, "rdev": INTEGER, "pin": FLAG, "umask": INTEGER},
        ATTRIBUTES, _CHANGE, _NAMES, pins=_pinned_if(6),
    ),
    "tmpfile": Operation(
        {"parent": INTEGER, "exclusive": FLAG, "mode": INTEGER, **_OWNER, "umask": INTEGER},
        ATTRIBUTES, _CHANGE, _UNNAMED, pins=_pinned,
    ),
    "mkdir": Operation(
        {**_ENTRY_AT, "mode": INTEGER, **_OWNER, "umask": INTEGER}, ATTRIBUTES, _CHANGE, _NAMES
    ),
    "symlink": Operation({**_ENTRY_AT, "target": BYTES, **_OWNER}, ATTRIBUTES, _CHANGE, _NAMES),
    "readlink": Operation({"ino": INTEGER}, BYTES, _READ, _NOTHING, repeatable=True),
    "link": Operation({"ino": INTEGER, **_ENTRY_AT}, ATTRIBUTES, _CHANGE, _NAMES),
    "unlink": Operation(
        {**_ENTRY_AT, "hold": FLAG}, ATTRIBUTES, _CHANGE, _NAMES, pins=_held_if(2)
    ),
    "rmdir": Operation(
        {**_ENTRY_AT, "hold": FLAG}, ATTRIBUTES, _CHANGE, _NAMES, pins=_held_if(2)
    ),
    "rename": Operation(
        {
            **_ENTRY_AT, "new_parent": INTEGER, "new_name": BYTES, "flags": INTEGER, "hold": FLAG,
        },
        optional(ATTRIBUTES), _CHANGE, _NAMES, pins=_held_if(5),
    ),
    "readdir": Operation(
        {"ino": INTEGER, "after": BYTES, "limit": INTEGER},
        ENTRIES, _READ, _NOTHING, repeatable=True,
    ),
    "getxattr": Operation({"ino": INTEGER, "name": BYTES}, BYTES, _READ, _NOTHING, repeatable=True),
    "setxattr": Operation(
        {"ino": INTEGER, "name": BYTES, "value": BYTES, "keep_setgid": FLAG},
        NOTHING, _CHANGE, _INODE, repeatable=True,
    ),
    # Not repeatable: XATTR_CREATE would find what it has made itself.
    "setxattr_if": Operation(
        {"ino": INTEGER, "name": BYTES, "value": BYTES, "keep_setgid": FLAG, "flags": INTEGER},
        NOTHING, _CHANGE, _INODE,
    ),
    "removexattr": Operation({"ino": INTEGER, "name": BYTES}, NOTHING, _CHANGE, _INODE),
    "listxattr": Operation({"ino": INTEGER}, list_of(BYTES), _READ, _NOTHING, repeatable=True),
    "resolve": Operation({"path": TEXT}, ATTRIBUTES, _READ, _NOTHING, repeatable=True),
    "open_name": Operation({"path": TEXT}, REGION, _READ, _NOTHING, repeatable=True),
    # A new region with the data gets a name, all in one step; the region is returned.
    "store": Operation(
        {"path": TEXT, "mode": INTEGER, **_OWNER, "exclusive": FLAG, "persist": FLAG},
        ATTRIBUTES, _CHANGE, _NAMES, payload=_UPLOAD, served=_TRANSFER,
    ),
    "fetch": Operation(
        {"path": TEXT, "limit": INTEGER}, FETCHED, _READ, _NOTHING, repeatable=True
    ),
    # With a mode the region is one of ``make_unnamed``, and gets it and the owner.
    "publish": Operation(
        {
            "region": REGION, "path": TEXT, "exclusive": FLAG, "mode": OPTIONAL_INTEGER,
            "uid": OPTIONAL_INTEGER, "gid": OPTIONAL_INTEGER,
        },
        ATTRIBUTES, _CHANGE, _NAMES,
    ),
    "link_name": Operation({"region": REGION, "path": TEXT}, NOTHING, _CHANGE, _NAMES),
    "unlink_name": Operation({"path": TEXT}, NOTHING, _CHANGE, _NAMES),
    # The engine
    "ping": Operation({}, NOTHING, _READ, _NOTHING, repeatable=True, served=_ENGINE),
    # Counters and state of the provider and its engine, as JSON; see provider/report.py.
    "stats": Operation({}, TEXT, _READ, _NOTHING, repeatable=True, served=_ENGINE),
    "shutdown": Operation({}, NOTHING, _CHANGE, _TARGET, served=_ENGINE),
    "watch": Operation(
        {"number": INTEGER, "new_names": FLAG}, change_codec.CHANGES, _READ, _NOTHING,
        repeatable=True, indefinite=True, served=_ENGINE,
    ),
    # Locks on files; they end with the connection, and so are not changes of the target.
    # The token of a client that connects again: what it held, and no other client has locked
    # meanwhile, it holds again.
    "lock_session": Operation(
        {"token": BYTES}, NOTHING, _READ, _NOTHING, repeatable=True, served=_LOCKS
    ),
    # ``kind`` is one of ``target/file_locks.py``, ``end`` the last byte, ``wait`` a number for
    # ``cancel_lock``, or 0: do not wait.
    "lock": Operation(
        {**_LOCK, "pid": INTEGER, "wait": INTEGER},
        NOTHING, _READ, _NOTHING, repeatable=True, indefinite=True, served=_LOCKS,
    ),
    "cancel_lock": Operation(
        {"wait": INTEGER}, NOTHING, _READ, _NOTHING, repeatable=True, served=_LOCKS
    ),
    "test_lock": Operation(
        _LOCK, optional(forms.FILE_LOCK), _READ, _NOTHING, repeatable=True, served=_LOCKS
    ),
    "holds_lock": Operation(_LOCK, FLAG, _READ, _NOTHING, repeatable=True, served=_LOCKS),
    # Direct access; a read-only connection gets read-only grants.
    "join": Operation(
        {"writable": FLAG}, optional(forms.JOINED), _READ, _NOTHING, served=_DIRECT
    ),
    "grant": Operation(
        {"region": REGION}, optional(forms.GRANTED), _READ, _NOTHING, served=_DIRECT
    ),
    "make": Operation({"size": INTEGER}, optional(forms.MADE), _CHANGE, _NAMES, served=_DIRECT),
    # The region is removed with the connection, unless it gets a name by ``publish``.
    "make_unnamed": Operation(
        {"size": INTEGER}, optional(forms.MADE), _CHANGE, _UNNAMED, served=_DIRECT
    ),
    "leave": Operation({}, NOTHING, _READ, _NOTHING, served=_DIRECT),
    # Migration; the provider's configuration also restricts who may do this.  Clients send
    # ``migrate`` to a source, with options as JSON, and ``migration_progress``; a source sends the
    # others to its destination.  Those with ``waits`` are served concurrently with other requests.
    "migrate": Operation(
        {"address": TEXT, "provider_id": INTEGER, "options": TEXT},
        NOTHING, _CHANGE, _TARGET, waits=True, served=_MIGRATION,
    ),
    "migration_progress": Operation(
        {}, forms.numbers("bytes that were sent, and all", 2),
        _READ, _NOTHING, repeatable=True, served=_MIGRATION,
    ),
    "receive_begin": Operation({"plan": TEXT}, NOTHING, _CHANGE, _TARGET, served=_MIGRATION),
    "receive_rows": Operation(
        {"table": TEXT}, NOTHING, _CHANGE, _TARGET, payload=_UPLOAD, served=_MIGRATION
    ),
    "receive_data": Operation(
        {}, NOTHING, _CHANGE, _TARGET, payload=_UPLOAD, served=_MIGRATION
    ),
    "receive_finish": Operation(
        {"regions": INTEGER}, NOTHING, _CHANGE, _TARGET, waits=True, served=_MIGRATION
    ),
    "receive_commit": Operation({}, NOTHING, _CHANGE, _TARGET, waits=True, served=_MIGRATION),
    "receive_abort": Operation({}, NOTHING, _CHANGE, _TARGET, served=_MIGRATION),
    # It changes nothing, but only a source has a reason to send it.
    "receive_outcome": Operation(
        {"uuid": TEXT}, FLAG, _CHANGE, _NOTHING, repeatable=True, waits=True, served=_MIGRATION
    ),
}  # fmt: skip

READING = frozenset(
    name
    for name, operation in OPERATIONS.items()
    if operation.changes is ChangeScope.NOTHING and operation.served in (Served.TARGET, _TRANSFER)
)
"""Operations that are served while the target is being migrated; the others wait.

``pin`` and ``unpin`` concern inodes without names, which are not migrated.
"""

CREATE = ("clone", "create", "create_and_write")
"""Operations that return a new region."""

UNDONE = frozenset(CREATE) | {
    name for name, operation in OPERATIONS.items() if operation.pins and name != "unpin"
}
"""Operations whose effect holds something for the caller: a region, or a pin.  :func:`undo`
gives it back if the caller gives up before it knows the result."""


def undo(name: str, arguments: Sequence[Any], result: Any) -> tuple[str, Sequence[Any]] | None:
    """Return the operation and arguments that give back what one of ``UNDONE`` holds, if any."""
    if name in CREATE:
        return "erase", (result,)
    pins = OPERATIONS[name].pins
    held = pins(arguments, result) if pins is not None else None
    return ("unpin", held) if held is not None else None


RESULTS: dict[str, Callable[[Any], Any]] = {
    name: operation.result.decode for name, operation in OPERATIONS.items()
}
"""Converts each operation's result in a reply to the return value of the operation."""


def operation_named(name: str) -> Operation:
    """Return the operation *name*.

    Raises:
        ProtocolError: there is none.
    """
    operation = OPERATIONS.get(name)
    if operation is None:
        raise ProtocolError(f"unknown operation {name!r:.60}")
    return operation


def access(name: str) -> RequiredAccess:
    """Return the access that the operation *name* requires.

    Raises:
        ProtocolError: there is no such operation.
    """
    return operation_named(name).access


def checked_arguments(name: str, arguments: Any) -> list[Any]:
    """Check and convert the arguments of the operation *name* from a message.

    Raises:
        ProtocolError: their number is wrong, or one does not match its form.
    """
    return forms.checked_arguments(name, OPERATIONS[name].forms, arguments)
