"""Operations of a target on whole files by path: to store one, and to fetch a small one.

A client does with one request what takes it several otherwise: looking for the directory, creating
a region, writing, giving it its name.
"""

from __future__ import annotations

import stat
import threading
from typing import Any

from warabi._core.attributes import FETCHED, Attributes
from warabi._core.buffers import readable
from warabi.errors import InvalidRegion
from warabi.metadata.inode import Inode
from warabi.metadata.namespace import about
from warabi.target.state import LOOPS
from warabi.target.target import Target

_ATTEMPTS = 10
"""How often a file is looked for that is replaced whenever it was found."""


def store(
    target: Target, path: str, mode: int, uid: int, gid: int, exclusive: bool, persist: bool,
    data: Any,
) -> Attributes:  # fmt: skip
    """Give a new region with *data* the name *path*, in an existing directory.

    In one step: others find what had the name before, which is replaced and loses it, or the new
    region with all its bytes.  That also holds after a crash of this process, and with *persist* of
    the machine, since the bytes are durable before the name.  On failure nothing remains.

    Raises:
        PathError: ENOENT, ENOTDIR, ELOOP; EISDIR for a directory; with *exclusive* EEXIST.
        InvalidBuffer, StorageFull, StorageError: as ``Target.create_and_write``.
    """
    view = readable(data, "store: data")
    target.creation.check_fits(len(view))
    names, guard = target.namespace, target.state.guard
    with about("store", path):

        def begun(steps: float) -> tuple[int, bytes, Inode]:
            with guard.lock, guard.checked:
                parent, name = names.split(path, steps)
                names.check_free(parent, name, exclusive)
                inode = names.new_unnamed(parent, mode, uid, gid, size=len(view), complete=True)
                target.locks.enter_new(inode)
                return parent, name, inode

        parent, name, inode = target.state.patiently(begun)
        try:
            if view:
                target.state.storage.write(inode.rid, 0, view)
            inode.measure = None
            if persist:
                target.committer.persist(inode, 0, len(view))
            with guard.lock, guard.checked:
                attributes = names.give_name(inode, parent, name, exclusive)
                inode.pins -= 1
        except BaseException:
            target.discard_new(inode)
            raise
        finally:
            target.locks.leave(inode)
    if persist:
        target.committer.commit()
    else:
        target.erasure.reap()  # what was replaced
    return attributes


def fetch(target: Target, path: str, limit: int) -> tuple[Attributes, bytes | None]:
    """Return the attributes of what is at *path*, where symbolic links are followed, and the bytes
    of a region of at most *limit* bytes; None for anything else.

    A region that is replaced meanwhile is looked for again.

    Raises:
        PathError: ENOENT, ENOTDIR, ELOOP.
        StorageError, CorruptTarget: reading failed.
        WouldBlock: in an event loop, if reading would wait.
    """
    limit = min(limit, FETCHED)
    wait = threading.get_ident() not in LOOPS
    with about("fetch", path):
        for attempt in range(_ATTEMPTS):
            found = target.namespace.follow(path)
            if not stat.S_ISREG(found.mode) or found.size > limit:
                break
            data = bytearray(found.size)
            try:
                count = target.read_into(found.region, 0, data, short=True, wait=wait)
            except InvalidRegion:
                if attempt == _ATTEMPTS - 1:
                    raise
            else:
                return found, bytes(memoryview(data)[:count])
        return found, None
