"""Ranges of the values that a target stores, and their validation.

Values enter a target in few places, whatever their source (API, wire, mount, import, migration):
``Catalogue.add``, ``Catalogue.set_attributes`` and ``Catalogue.set_xattr``, the name checks of
``Tree``, and the rows of a migration.  Each of them calls the functions here.  They do no I/O and
do not know tables.

The ranges are those of Linux, so that every value of a target can be shown by a mount, stored by
SQLite, and written to an archive:

* Times are *clamped*, as Linux does for times that a file system cannot store.
* All other values are *rejected*, with the errno of the system call.
* Values that got into a target in another way are repaired by fsck alone (:func:`mended`).
"""

from __future__ import annotations

import errno
import operator
import os
import stat
from collections.abc import Sequence
from typing import Any, NamedTuple

from warabi._core.attributes import APPEND_ONLY, IMMUTABLE, NO_DUMP
from warabi._core.buffers import MAX_SIZE
from warabi.errors import PathError, path_error
from warabi.metadata import acl

TIME_MAX = (1 << 63) - 1
"""The latest time, in ns since the epoch, in the year 2262; the earliest is its negative."""
TIME_MIN = -TIME_MAX
CHANGE_TIME_MAX = TIME_MAX - (1 << 60)
"""The latest change time.  Each change advances it by at least 1 ns; this leaves enough range."""
OWNER_MAX = (1 << 32) - 2
"""The largest user or group ID: (uid_t) -1 means none."""
NOBODY = 65534
"""Linux's overflow ID: replaces an invalid owner."""
MODE_MAX = 0o177777
UMASK_MAX = 0o777
DEVICE_MAX = (1 << 32) - 1
LINKS_MAX = (1 << 31) - 1
"""The most names of an inode, and most subdirectories of a directory plus 2."""
NAME_MAX = 255
"""Most bytes of a name."""
TARGET_MAX = 4095
"""Most bytes of the target of a symbolic link."""
XATTR_NAME_MAX = 255
XATTR_VALUE_MAX = 64 * 1024
XATTR_LIST_MAX = 64 * 1024
"""Most bytes of the names of all attributes of an inode, each with a NUL."""
XATTR_TOTAL_MAX = 16 * 1024 * 1024
"""Most bytes of all attributes of an inode; less than fits into an archive's entry."""
SLOT_MIN, SLOT_MAX = 2, (1 << 63) - 2
"""Slots of region IDs; slot 1 is the root directory's."""
GENERATION_MAX = (1 << 63) - 1
FLAGS_MAX = IMMUTABLE | APPEND_ONLY | NO_DUMP
SEQUENCE = 1 << 62
"""New slots follow the largest one below this.  An import may create regions in slots above it;
they do not affect the sequence, so it never reaches the end of the slots, and each ID that is ever
assigned can be imported into another target."""

KINDS = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR,
         stat.S_IFBLK)  # fmt: skip
"""The types of inodes."""
SPACES = (b"user.", b"trusted.", b"security.")
"""Prefixes of extended attribute names, except for those of access control lists."""
LISTS = (acl.ACCESS, acl.DEFAULT)

RANGES: dict[str, tuple[int, int]] = {
    "generation": (0, GENERATION_MAX),
    "mode": (0, MODE_MAX),
    "nlink": (0, LINKS_MAX),
    "uid": (0, OWNER_MAX),
    "gid": (0, OWNER_MAX),
    "rdev": (0, DEVICE_MAX),
    "size": (0, MAX_SIZE),
    "atime": (TIME_MIN, TIME_MAX),
    "mtime": (TIME_MIN, TIME_MAX),
    "ctime": (TIME_MIN, CHANGE_TIME_MAX),
    "btime": (TIME_MIN, TIME_MAX),
    "flags": (0, FLAGS_MAX),
}
"""The least and the largest value of each number of an inode."""


# Times


def clamped(ns: Any, what: str = "time") -> int:
    """Return a time in ns since the epoch, clamped to the valid range."""
    return max(TIME_MIN, min(TIME_MAX, _integer(ns, what)))


def clamped_change(ns: int) -> int:
    """The same as :func:`clamped`, for a change time."""
    return max(TIME_MIN, min(CHANGE_TIME_MAX, ns))


# Numbers


def _integer(value: Any, what: str) -> int:
    if type(value) is int:
        return value
    try:
        if isinstance(value, bool):
            raise TypeError
        return int(operator.index(value))  # accepts NumPy integers
    except TypeError:
        raise path_error(errno.EINVAL, f"{what} {value!r:.60}: not an integer") from None


def _within(value: Any, low: int, high: int, what: str) -> int:
    number = _integer(value, what)
    if not low <= number <= high:
        raise path_error(errno.EINVAL, f"{what} {number}: must be from {low} to {high}")
    return number


def owner(value: Any, what: str = "user ID") -> int:
    """Check a user or group ID; PathError EINVAL, also for -1, which means "unchanged" for
    chown(2): use None for that."""
    return _within(value, 0, OWNER_MAX, what)


def mode(value: Any) -> int:
    """Check permissions with or without a file type; PathError EINVAL."""
    return _within(value, 0, MODE_MAX, "mode")


def umask(value: Any) -> int:
    """Check a file mode creation mask; PathError EINVAL."""
    return _within(value, 0, UMASK_MAX, "umask")


def device(value: Any) -> int:
    """Check a device number; PathError EINVAL."""
    return _within(value, 0, DEVICE_MAX, "device number")


def inode_flags(value: Any) -> int:
    """Check the flags of an inode; PathError EOPNOTSUPP for others than the three."""
    flags = _integer(value, "flags")
    if flags & ~FLAGS_MAX:
        raise path_error(
            errno.EOPNOTSUPP, f"flags {flags:#x}: only {FLAGS_MAX:#x} (chattr +i, +a, +d) are known"
        )
    return flags


def count(value: Any, what: str) -> int:
    """Check a count; PathError EINVAL."""
    return _within(value, 0, MAX_SIZE, what)


def is_region_id(slot: int, generation: int) -> bool:
    """Whether a region can have that slot and generation."""
    return SLOT_MIN <= slot <= SLOT_MAX and 0 <= generation <= GENERATION_MAX


# Names, link targets and attributes


def length(name: bytes) -> None:
    """Check the length of a name; PathError ENAMETOOLONG."""
    if len(name) > NAME_MAX:
        raise path_error(errno.ENAMETOOLONG, f"{os.fsdecode(name)}: longer than {NAME_MAX} bytes")


def name(value: bytes) -> bytes:
    """Check a name in a directory; PathError EINVAL, ENAMETOOLONG."""
    length(value)
    if not value or value in (b".", b"..") or b"/" in value or b"\0" in value:
        raise path_error(errno.EINVAL, f"{os.fsdecode(value)!r}: not a file name")
    return value


def link_target(value: bytes) -> bytes:
    """Check the target of a symbolic link; PathError ENOENT if empty, ENAMETOOLONG, EINVAL."""
    if not 0 < len(value) <= TARGET_MAX:
        number = errno.ENAMETOOLONG if value else errno.ENOENT
        raise path_error(
            number, f"symlink: the target must have 1 to {TARGET_MAX} bytes, not {len(value)}"
        )
    if b"\0" in value:
        raise path_error(errno.EINVAL, f"symlink: the target {value!r:.100} has a NUL byte")
    return value


def xattr_name(value: bytes) -> bytes:
    """Check the name of an extended attribute; PathError ERANGE for its length, EINVAL,
    EOPNOTSUPP."""
    if value in LISTS:
        return value
    if not 0 < len(value) <= XATTR_NAME_MAX:
        raise path_error(
            errno.ERANGE,
            f"extended attribute: the name must have 1 to {XATTR_NAME_MAX} bytes, not {len(value)}",
        )
    if not value.startswith(SPACES):
        raise path_error(errno.EOPNOTSUPP, f"{os.fsdecode(value)}: not supported")
    if value in SPACES:
        raise path_error(
            errno.EINVAL, f"{os.fsdecode(value)}: nothing follows the namespace prefix"
        )
    if b"\0" in value:
        raise path_error(errno.EINVAL, f"{os.fsdecode(value)!r}: a NUL byte in an attribute's name")
    return value


def xattr(key: bytes, value: bytes) -> None:
    """Check an extended attribute; PathError as :func:`xattr_name`, E2BIG, EINVAL for a malformed
    list."""
    xattr_name(key)
    if len(value) > XATTR_VALUE_MAX:
        raise path_error(
            errno.E2BIG,
            f"{os.fsdecode(key)}: the value may have at most {XATTR_VALUE_MAX} bytes, not"
            f" {len(value)}",
        )
    if key in LISTS:
        acl.unpack(value)


def xattr_flags(value: Any) -> int:
    """Check the flags of setxattr(2); PathError EINVAL."""
    flags = _integer(value, "setxattr: flags")
    if flags & ~(os.XATTR_CREATE | os.XATTR_REPLACE):
        raise path_error(
            errno.EINVAL,
            f"setxattr: flags {flags:#x}: must be XATTR_CREATE, XATTR_REPLACE or 0",
        )
    return flags


# Whole rows


class Row(NamedTuple):
    """An inode's values, in the order of the catalogue's columns."""

    ino: int
    generation: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    atime: int
    mtime: int
    ctime: int
    anonymous: int
    target: bytes | None
    btime: int = 0
    flags: int = 0
    packed: int = 0


def fault(values: Sequence[Any]) -> str:
    """Return what is wrong with the values of an inode; empty if they are valid."""
    row = Row(*values)
    numbers = (*row[:12], row.packed, row.btime, row.flags)
    if not all(type(value) is int for value in numbers):
        return "a number is not an integer"
    for column, (low, high) in RANGES.items():
        value = getattr(row, column)
        if not low <= value <= high:
            return f"{column} {value} is not from {low} to {high}"
    if not 1 <= row.ino <= SLOT_MAX:
        return f"ino {row.ino} is not from 1 to {SLOT_MAX}"
    if stat.S_IFMT(row.mode) not in KINDS:
        return f"mode {row.mode:#o} has no valid file type"
    region, link = stat.S_ISREG(row.mode), stat.S_ISLNK(row.mode)
    if row.anonymous not in (0, 1) or (row.anonymous and not region):
        return f"anonymous is {row.anonymous}"
    if row.packed not in (0, 1, 2) or (row.packed and not region):
        return f"packed is {row.packed}"
    if not link:
        return "" if row.target is None else "it has a target but is not a symbolic link"
    if not isinstance(row.target, bytes):
        return "it is a symbolic link without a target"
    try:
        link_target(row.target)
    except PathError as error:
        return str(error)
    return "" if row.size == len(row.target) else "its size is not its target's"


def mended(values: Sequence[Any]) -> Row:
    """Repair the values of an inode: replace invalid numbers, or an invalid link target, by the
    nearest valid ones.

    Owners become ``NOBODY``, and a file whose owner changes loses its set-ID bits; a device number
    becomes 0; a link's target ends before its first NUL, as every program saw it.  Type and size,
    which cannot be guessed, are left to fsck.
    """
    row = Row(*values)
    new: dict[str, Any] = {
        column: _mended_number(column, getattr(row, column))
        for column in RANGES
        if column not in ("generation", "size")
    }
    if (new["uid"], new["gid"]) != (row.uid, row.gid) and stat.S_ISREG(new["mode"]):
        new["mode"] &= ~(stat.S_ISUID | stat.S_ISGID)
    # Other values of these two are left to fsck.
    new.update({c: 0 for c in ("anonymous", "packed") if type(getattr(row, c)) is not int})
    if stat.S_ISLNK(new["mode"]) and row.target is not None:
        held: Any = row.target
        held = held.encode(errors="surrogateescape") if isinstance(held, str) else held
        target = (held if isinstance(held, bytes) else b"").partition(b"\0")[0][:TARGET_MAX] or b"?"
        new.update(target=target, size=len(target))
    return row._replace(**new)


def _mended_number(column: str, value: Any) -> int:
    low, high = RANGES[column]
    if type(value) is int and low <= value <= high:
        return value
    if column in ("uid", "gid"):
        return NOBODY
    if isinstance(value, float):  # SQLite keeps such a one in a column for integers, too
        value = int(max(-(2.0**64), min(2.0**64, value)))
    if column == "mode" and type(value) is int:
        return value & MODE_MAX
    if column == "nlink":  # an inode with 0 links would be removed
        return max(1, min(value, high)) if type(value) is int else 1
    if type(value) is not int or (column in ("rdev", "flags") and not low <= value <= high):
        return 0
    return max(low, min(high, value))


def xattr_fault(key: bytes, value: bytes) -> str:
    """Return what is wrong with an extended attribute; empty if it is valid."""
    try:
        xattr(key, value)
    except PathError as error:
        return str(error)
    return ""


def mode_without(key: bytes, mode: int) -> int:
    """Return the mode of an inode that loses an invalid attribute.

    With an access control list the group bits are the mask of the list; without the list they would
    apply to the group.  The group's own rights are unknown, so it gets none.
    """
    return mode & ~stat.S_IRWXG if key == acl.ACCESS else mode
