"""Crash recovery of a target: compares the catalogue with the storage when it is opened.

Called by ``Target`` when it is opened; uses the catalogue and the storage alone.
"""

from __future__ import annotations

import logging

from warabi._core import interrupts
from warabi.backends import Storage
from warabi.metadata.catalogue import Catalogue
from warabi.metadata.inode import MOVED, PACKED

log = logging.getLogger(__name__)


def recover(catalogue: Catalogue, storage: Storage) -> None:
    """After a crash: erase data that no row mentions, and take sizes from files.

    A region that was not persisted and lost its file is removed; if it had a name, it becomes an
    empty region, as on other file systems.  This may take long; Ctrl-C interrupts it.
    """
    orphaned = resized = lost = 0
    for inode in catalogue.orphans():
        catalogue.remove(inode)
    missing = set(catalogue.fresh())
    any_found = False
    for rid, size in storage.scan():
        any_found = True
        missing.discard(rid)
        found = catalogue.region(rid)
        if found is None:
            # Never persisted, or erased: the durable catalogue does not know it.
            storage.erase(rid)
            orphaned += 1
        else:
            if found.packed == PACKED:  # it had outgrown its pack, but that was not committed
                found.packed = MOVED
                catalogue.touch(found, durable=True, tell=False)
            if found.size != size and not (size < found.size and storage.attests(found, size)):
                catalogue.resize(found, size)
                resized += 1
            times = storage.kept_times(rid)
            if times is not None and times.ctime > found.ctime:
                catalogue.set_attributes(found, mtime=times.mtime, ctime=times.ctime)
                catalogue.touch(found, durable=False)
        catalogue.trim()
        interrupts.check()  # the next open starts again, as after a crash
    for rid in sorted(missing):
        interrupts.check()
        found = catalogue.region(rid)
        if found is not None and not storage.found(found):
            lost += 1
            if found.anonymous:
                catalogue.remove(found)
            else:
                storage.create(rid, 0)
                catalogue.resize(found, 0)
    if storage.tidy(storage.attests) or any_found:
        storage.sync_found()  # what the killed process wrote is not durable yet
    if orphaned or resized or lost:
        log.warning(
            "%s was not closed cleanly: removed %d unfinished regions, took %d sizes from"
            " files, lost the bytes of %d regions that were not persisted",
            catalogue.path, orphaned, resized, lost,
        )  # fmt: skip
