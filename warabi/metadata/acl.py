"""POSIX access control lists, in the form in which the kernel keeps them as extended attributes.

A list says what a file's mode cannot: rights of named users and groups.  Where there is one, the
mode's group bits are its *mask*, the most that anybody but the owner and the others gets.
Knows nothing of inodes; all numbers of a mode are of its nine permission bits.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from typing import NamedTuple

from warabi.errors import path_error

ACCESS = b"system.posix_acl_access"
"""The attribute with the list that is obeyed."""
DEFAULT = b"system.posix_acl_default"
"""Of a directory: the attribute with the list that what is made in it gets."""

_VERSION = struct.pack("<I", 2)
_ENTRY = struct.Struct("<HHI")
_NO_ID = 0xFFFFFFFF
_OWNER, _USER, _OWNING_GROUP, _GROUP, _MASK, _OTHERS = 1, 2, 4, 8, 16, 32


class AclEntry(NamedTuple):
    """Who (*tag*, with the ID of a named user or group) may do what (three bits)."""

    tag: int
    permissions: int
    id: int


def unpack(value: bytes) -> list[AclEntry]:
    """The entries of an attribute's value, none for a list that takes a list away.

    Raises:
        PathError: EINVAL, it is no valid list; EOPNOTSUPP, of another version.
    """
    if value[:4] != _VERSION or (len(value) - 4) % _ENTRY.size:
        number = errno.EINVAL if len(value) < 4 or value[:4] == _VERSION else errno.EOPNOTSUPP
        raise path_error(number, "access control list: malformed")
    entries = [AclEntry(*fields) for fields in _ENTRY.iter_unpack(value[4:])]
    tags = [entry.tag for entry in entries]
    named = _USER in tags or _GROUP in tags
    valid = (
        tags == sorted(tags)
        and all(tags.count(tag) == 1 for tag in (_OWNER, _OWNING_GROUP, _OTHERS))
        and tags.count(_MASK) <= 1
        and (_MASK in tags or not named)
        and {*tags} <= {_OWNER, _USER, _OWNING_GROUP, _GROUP, _MASK, _OTHERS}
        and all(entry.permissions <= 7 for entry in entries)
        and all(entry.id != _NO_ID for entry in entries if entry.tag in (_USER, _GROUP))
    )
    if entries and not valid:
        raise path_error(errno.EINVAL, "access control list: its entries make no list")
    return entries


def pack(entries: Sequence[AclEntry]) -> bytes:
    """The attribute's value for *entries*."""
    return _VERSION + b"".join(_ENTRY.pack(*entry) for entry in entries)


def extended(entries: Sequence[AclEntry]) -> bool:
    """Whether they say more than a mode can."""
    return len(entries) > 3


def _shift(entries: Sequence[AclEntry], tag: int) -> int | None:
    """Where in a mode the bits of a *tag* are, None when they are not in it."""
    if tag == _OWNER:
        return 6
    if tag == _OTHERS:
        return 0
    return 3 if tag == (_MASK if extended(entries) else _OWNING_GROUP) else None


def mode_of(entries: Sequence[AclEntry]) -> int:
    """The permission bits that a file with this list shows."""
    mode = 0
    for entry in entries:
        shift = _shift(entries, entry.tag)
        if shift is not None:
            mode |= entry.permissions << shift
    return mode


def with_mode(entries: Sequence[AclEntry], mode: int) -> list[AclEntry]:
    """The list after a chmod to *mode*."""
    changed = []
    for entry in entries:
        shift = _shift(entries, entry.tag)
        if shift is not None:
            entry = entry._replace(permissions=mode >> shift & 7)
        changed.append(entry)
    return changed
