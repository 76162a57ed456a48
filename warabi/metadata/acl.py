"""POSIX access control lists, in the format that the kernel uses in extended attributes.

A list extends a file's mode by rights of named users and groups.  If a file has one, the group bits
of its mode are the *mask*, the maximal rights of all except owner and others.
This module does not know inodes; all modes here are the nine permission bits.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from typing import NamedTuple

from warabi.errors import path_error

ACCESS = b"system.posix_acl_access"
"""The attribute with the list for access checks."""
DEFAULT = b"system.posix_acl_default"
"""The attribute of a directory with the list that new entries inherit."""

_VERSION = struct.pack("<I", 2)
_ENTRY = struct.Struct("<HHI")
_NO_ID = 0xFFFFFFFF
_OWNER, _USER, _OWNING_GROUP, _GROUP, _MASK, _OTHERS = 1, 2, 4, 8, 16, 32


class AclEntry(NamedTuple):
    """The permissions (three bits) of the users given by *tag*, and *id* for a named user or
    group."""

    tag: int
    permissions: int
    id: int


def unpack(value: bytes) -> list[AclEntry]:
    """Parse an attribute's value; an empty list of entries removes the access control list.

    Raises:
        PathError: EINVAL, it is not valid; EOPNOTSUPP, of another version.
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
        raise path_error(
            errno.EINVAL, "access control list: the combination of entries is not valid"
        )
    return entries


def pack(entries: Sequence[AclEntry]) -> bytes:
    """Return the attribute's value for *entries*."""
    return _VERSION + b"".join(_ENTRY.pack(*entry) for entry in entries)


def extended(entries: Sequence[AclEntry]) -> bool:
    """Whether the entries exceed what a mode can express."""
    return len(entries) > 3


def _shift(entries: Sequence[AclEntry], tag: int) -> int | None:
    """Return the shift of a *tag*'s bits in a mode, None if they are not part of it."""
    if tag == _OWNER:
        return 6
    if tag == _OTHERS:
        return 0
    return 3 if tag == (_MASK if extended(entries) else _OWNING_GROUP) else None


def mode_of(entries: Sequence[AclEntry]) -> int:
    """Return the permission bits of a file with this list."""
    mode = 0
    for entry in entries:
        shift = _shift(entries, entry.tag)
        if shift is not None:
            mode |= entry.permissions << shift
    return mode


def with_mode(entries: Sequence[AclEntry], mode: int) -> list[AclEntry]:
    """Return the list after a chmod to *mode*."""
    changed = []
    for entry in entries:
        shift = _shift(entries, entry.tag)
        if shift is not None:
            entry = entry._replace(permissions=mode >> shift & 7)
        changed.append(entry)
    return changed
