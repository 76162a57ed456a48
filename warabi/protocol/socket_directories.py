"""Directories for the local sockets of one user, which no other user can enter.

A socket in such a directory cannot be taken, replaced or filled with connections by others, but for
root.  The first place is one where other users cannot make anything.  Only where there is none, as
in some containers, it is in ``/tmp``, where another user may have taken a name: then the next
name is used, and whoever looks for a socket looks in all of them that are the user's.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from warabi.errors import PermissionDenied

_IN_TMP = 8  # names there, of which the first one that is free or the user's is used


def places(uid: int) -> list[Path]:
    """Where the directory of user *uid* may be, the best place first."""
    first = Path("/run/warabi") if uid == 0 else Path(f"/run/user/{uid}/warabi")
    names = (f"warabi-{uid}" + (f".{number}" if number else "") for number in range(_IN_TMP))
    return [first, *(Path("/tmp", name) for name in names)]


def is_private(directory: Path, uid: int) -> bool:
    """Whether *directory* is one, is that user's, and has mode 0700.

    Raises:
        OSError: it cannot be looked at; ``FileNotFoundError``: there is none.
    """
    info = directory.lstat()
    return stat.S_ISDIR(info.st_mode) and info.st_uid == uid and not info.st_mode & 0o077


def made(uid: int) -> Path:
    """The directory of *uid*, this process's user, which is made if there is none.

    Raises:
        PermissionDenied: every place is another user's, or cannot be used.
    """
    tried = []
    for directory in places(uid):
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            if is_private(directory, uid):
                return directory
            reason = f"is not a directory of mode 0700 of user {uid}"
        except OSError as error:
            reason = error.strerror or str(error)
        tried.append(f"{directory} {reason}")
    raise PermissionDenied(f"no directory for local sockets: {'; '.join(tried)}")


def existing(uid: int) -> Iterator[Path]:
    """The directories of user *uid* that are there, and are what they should be."""
    for directory in places(uid):
        try:
            private = is_private(directory, uid)
        except OSError:
            continue
        if private:
            yield directory
