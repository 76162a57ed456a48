"""Who owns a target in a pool: one process at a time, and the others fenced off.

The object ``NAME.owner`` has the attribute ``owner``: the address of the owner's connection, its
host and process, and a number that the owner increases every ``OWNER_BEAT`` seconds; or nothing.
Every change of it is conditional on what was read before, so that of several processes one
succeeds.

Who finds an owner waits for the number to change.  If it does not for ``OWNER_SILENCE`` seconds,
the owner is dead, stopped, or cut off: its address is blocklisted, *then* the attribute is changed,
and then the target is opened.  So an owner that comes back can write nothing: OSDs that serve the
new owner know the blocklist, and refuse the old one.  Only durations are measured, each by one
process, and no clocks are compared.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import threading
import time
from typing import Any

from warabi._core import forks, interrupts
from warabi._core.tuning import OWNER_BEAT, OWNER_POLL, OWNER_SILENCE
from warabi.backends.librados import Change, Cluster, Pool
from warabi.errors import PermissionDenied, TargetBusy

log = logging.getLogger(__name__)

_BLOCKLISTED = 365 * 24 * 3600
"""Seconds for which a former owner is refused.  Longer than any process stays stopped: one that
continues after that could write.  An entry of the cluster's map costs some tens of bytes."""
_KEY = "owner"


class Ownership:
    """Exclusive ownership of a target, until it is released.

    Args:
        cluster, pool: a connection of this target's own.
        name: the object.
        label: the target, for messages.
        patience: seconds to wait for a living owner to release it.

    Raises:
        TargetBusy: a living process owns it.
        PermissionDenied: the former owner cannot be blocklisted.
        OSError: an error of the cluster.
    """

    def __init__(
        self, cluster: Cluster, pool: Pool, name: str, label: str, patience: float
    ) -> None:
        self._pool = pool
        self._name = name
        self._label = label
        self._who = {
            "address": cluster.address(), "host": socket.gethostname(), "process": os.getpid(),
        }  # fmt: skip
        self._beat = 0
        self._record = b""
        self._acquire(cluster, time.monotonic() + patience)
        self._stop = forks.event()
        self._thread = threading.Thread(target=self._keep, name="warabi-owner", daemon=True)
        self._thread.start()

    def _next(self) -> bytes:
        self._beat += 1
        return json.dumps({**self._who, "beat": self._beat}).encode()

    def _replace(self, found: bytes) -> bool:
        """Change the attribute from *found*; False if it is another one by now."""
        record = self._next()
        try:
            self._pool.apply(self._name, Change().expect(_KEY, found).attribute(_KEY, record))
        except OSError as error:
            if error.errno != errno.ECANCELED:
                raise
            return False
        self._record = record
        return True

    def _acquire(self, cluster: Cluster, deadline: float) -> None:
        first, since = b"", time.monotonic()
        while True:
            found = self._pool.attribute(self._name, _KEY) or b""
            now = time.monotonic()
            if not found:
                if self._replace(found):
                    return
            elif found != first:
                if first and now >= deadline:
                    raise TargetBusy(f"target {self._label}: already open in {_owner(found)}")
                first, since = found, now
            elif now - since >= OWNER_SILENCE:
                self._fence(cluster, found)
                if self._replace(found):
                    return
            interrupts.check()
            time.sleep(OWNER_POLL)

    def _fence(self, cluster: Cluster, found: bytes) -> None:
        log.warning(
            "%s was not closed by %s, which does not respond: it is blocklisted",
            self._label, _owner(found),
        )  # fmt: skip
        try:
            cluster.blocklist(str(_parsed(found).get("address", "")), _BLOCKLISTED)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM):
                raise
            raise PermissionDenied(
                f"target {self._label}: {_owner(found)} did not close it, and this user may not"
                " blocklist that: it needs the capability mon 'allow command \"osd blocklist\"'"
            ) from error

    def _keep(self) -> None:
        while not self._stop.wait(OWNER_BEAT):
            try:
                if self._replace(self._record):
                    continue
                # A beat whose outcome was not known may have succeeded.
                found = self._pool.attribute(self._name, _KEY) or b""
            except OSError as error:
                if error.errno != errno.ESHUTDOWN:
                    log.warning("%s: the cluster does not respond: %s", self._label, error.strerror)
                    continue
                found = b""
            if _parsed(found).get("address") == self._who["address"]:
                self._record = found
                continue
            log.error("%s: another process has taken it over; nothing is written any more",
                      self._label)  # fmt: skip
            return

    def forked(self) -> None:
        """In a forked child: it is the parent's."""
        self._stop.set()

    def release(self) -> None:
        """Let the next process have it at once."""
        self._stop.set()
        self._thread.join()
        try:
            self._pool.apply(self._name, Change().expect(_KEY, self._record).attribute(_KEY, b""))
        except OSError as error:
            log.warning("%s could not be released: %s", self._label, error.strerror)


def _parsed(record: bytes) -> dict[str, Any]:
    try:
        found = json.loads(record)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _owner(record: bytes) -> str:
    who = _parsed(record)
    return f"process {who.get('process', '?')} of host {who.get('host', '?')}"
