"""Directories for the local sockets of one user, which no other user can enter.

No other user except root can take or replace a socket in such a directory, or fill its queue.  The
preferred place is one where other users cannot create files.  Only if it does not exist, as in some
containers, the directory is in ``/tmp``, where another user may have taken the name: then the next
name is used, and clients search all of them that belong to the user.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from warabi.errors import PermissionDenied

_IN_TMP = 8  # candidate names in /tmp; the first one that is free or the user's is used


def places(uid: int) -> list[Path]:
    """Return the candidate paths for user *uid*, in order of preference."""
    first = Path("/run/warabi") if uid == 0 else Path(f"/run/user/{uid}/warabi")
    names = (f"warabi-{uid}" + (f".{number}" if number else "") for number in range(_IN_TMP))
    return [first, *(Path("/tmp", name) for name in names)]


def is_private(directory: Path, uid: int) -> bool:
    """Whether *directory* is a directory that belongs to the user and has mode 0700.

    Raises:
        OSError: lstat(2) failed; ``FileNotFoundError``: it does not exist.
    """
    info = directory.lstat()
    return stat.S_ISDIR(info.st_mode) and info.st_uid == uid and not info.st_mode & 0o077


def made(uid: int) -> Path:
    """Return the directory of *uid*, this process's user; creates it if it is missing.

    Raises:
        PermissionDenied: no candidate can be used.
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
    """Yield the valid directories of user *uid*."""
    for directory in places(uid):
        try:
            private = is_private(directory, uid)
        except OSError:
            continue
        if private:
            yield directory
