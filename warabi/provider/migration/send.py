"""The source's side of a migration: blocking, in the thread of the caller."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from warabi import errors
from warabi._core import forks, interrupts
from warabi._core.tuning import CHANGES_PATIENCE
from warabi.errors import ConfigError, ConnectionLost, TimedOut
from warabi.metadata.journal import sync_directory
from warabi.protocol.pending import PendingRequest
from warabi.protocol.wire import Limits
from warabi.provider.migration import contents
from warabi.provider.migration.options import MigrationOptions, MigrationPlan, destination
from warabi.provider.migration.records import PIECE_HEADER, TABLES, join_rows, pack_row, put_header
from warabi.remote.connection import BlockingConnection
from warabi.target.target import Target

if TYPE_CHECKING:
    from warabi.provider.core import ProviderCore

log = logging.getLogger(__name__)

_TRANSFER_SIZE = 1024 * 1024
_AHEAD = 4
"""Pending messages; their bytes are in the socket's buffer."""
_BLOCK = 4096  # alignment of chunks of a large region, for the destination's page cache
_SKIPPED = 16  # most region bytes per message byte, if many are zeros
_LONGEST = 1 << 31  # length of a chunk of zeros; a message has 32 bits for it
_ROOM = 64
"""Bytes of a message in addition to region data: at least a chunk's header."""


class Sending:
    """A migration of a provider's target, at the source.

    Args:
        core: the provider.
        where: address and provider ID of the destination.
        options: validated options.
        progress: called after each step with :attr:`done` and :attr:`total`.

    Attributes:
        done: bytes of regions that the destination has.
        total: bytes of all regions.
    """

    def __init__(
        self,
        core: ProviderCore,
        where: tuple[str, int],
        options: MigrationOptions,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        self._core = core
        self._address, self._provider_id = where
        self._options = options
        self._progress = progress or (lambda done, total: None)
        self._connection: BlockingConnection | None = None
        self._pending: deque[tuple[PendingRequest, int]] = deque()
        self._committing = False
        self._stopping = False
        self._ended = forks.event()
        self._thread = 0  # ID of the thread that runs it
        self._lock = forks.lock()  # protects the state that stop() needs
        self.done = 0
        self.total = 0

    def run(self) -> None:
        """Migrate; raises as ``Provider.migrate_target``."""
        self._thread = threading.get_ident()
        self._core.begin_sending(self)
        try:
            self._run()
        finally:
            self._ended.set()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def stop(self) -> None:
        """Abort the migration, unless its commit has begun, and wait for its end."""
        with self._lock:
            self._stopping = True
            if self._connection is not None and not self._committing:
                self._connection.close(0)
        if threading.get_ident() != self._thread:  # for instance if *progress* closes the provider
            self._ended.wait()

    def _run(self) -> None:
        target = self._core.target
        assert self._core.connect is not None
        connection = self._core.connect(self._address)
        with self._lock:
            self._connection = connection
        try:
            self._check_stopping()
            # The destination refuses before any change is blocked.
            self._call("receive_begin", self._plan(target).model_dump_json(exclude_none=True))
            try:
                self._core.changes.freeze(CHANGES_PATIENCE, lambda: self._stopping)
                try:
                    target.sharing.pause()
                    self._send_all(target)
                    self._commit(target.uuid)
                    self._core.give_up(self._gone())
                finally:
                    target.sharing.resume()
                    self._core.changes.thaw()
            except BaseException:
                self._abort()
                raise
        finally:
            connection.close(0)
        self._leave(target)

    def _gone(self) -> str:
        return (
            f"provider {self._core.provider_id}: its target was migrated to provider"
            f" {self._provider_id} at {self._address}"
        )

    def _check_stopping(self) -> None:
        if self._stopping:
            raise ConnectionLost("migrate: the provider is being closed")

    def _plan(self, target: Target) -> MigrationPlan:
        source = self._core.config.target
        assert source is not None
        if source.backend.remote is not None:
            raise ConfigError(
                f"migrate: {target.state.catalogue.path} is in a pool: close it, and serve it from"
                " the other host"
            )
        quota = target.state.catalogue.capacity
        settings = source.model_dump(exclude_none=True)
        settings["config"].setdefault("checksums", target.state.catalogue.summed is not None)
        found = destination(settings, quota, self._options)
        path = target.state.catalogue.path
        return MigrationPlan(
            **found.model_dump(),
            uuid=target.uuid,
            name=path.name if path else target.uuid,
        )

    # What is sent

    def _send_all(self, target: Target) -> None:
        """Send everything and return when the destination has it, durably."""
        assert self._connection is not None
        limit = min(self._connection.limits.payload, Limits().payload)
        size = min(self._options.transfer_size or _TRANSFER_SIZE, limit - _ROOM)
        place = memoryview(bytearray(size + _ROOM))
        regions, self.total = contents.totals(target)
        self._progress(0, self.total)
        for table in TABLES:
            self._send_rows(target, table, size)
        self._send_regions(target, place)
        self._call("receive_finish", regions)

    def _send_rows(self, target: Target, table: str, size: int) -> None:
        batch: list[bytes] = []
        used = 0
        for row in contents.rows(target, table):
            packed = pack_row(row)
            if batch and used + len(packed) > size:
                self._submit("receive_rows", table, payload=join_rows(batch))
                batch, used = [], 0
            batch.append(packed)
            used += len(packed)
        if batch:
            self._submit("receive_rows", table, payload=join_rows(batch))

    def _send_regions(self, target: Target, place: memoryview) -> None:
        """Send the data of every region: many small regions per message, large ones in several."""
        zeros = bytes(len(place))
        used = done = read = 0  # bytes of the message, of regions, and of those that were read
        for region, size in contents.regions(target):
            offset = data = end = 0
            while True:
                room = len(place) - used - PIECE_HEADER
                if used and (room < min(_BLOCK, size - offset) or read >= _SKIPPED * len(place)):
                    self._submit("receive_data", payload=place[:used], size=done)
                    used = done = read = 0
                    continue
                if offset == end:
                    data, end = contents.next_data(target, region, offset, size)
                start = used + PIECE_HEADER
                if data > offset:
                    length, zero = min(data - offset, _LONGEST), True
                else:
                    length = min(end - offset, room)
                    if length > _BLOCK and length < end - offset:
                        length -= (offset + length) % _BLOCK
                    piece = place[start : start + length]
                    target.read_into(region, offset, piece)
                    read += length
                    zero = not (length and (piece[0] or piece[-1])) and piece == zeros[:length]
                # The destination writes no zeros, so that there is a hole.
                put_header(place, used, region, offset, length, zero)
                used = start + (0 if zero else length)
                offset += length
                done += length
                if offset == size:
                    break
        if used:
            self._submit("receive_data", payload=place[:used], size=done)
        while self._pending:
            self._take_reply()

    # Commit

    def _commit(self, uuid: str) -> None:
        """Make the destination install the target; returns when it certainly has."""
        with self._lock:
            self._check_stopping()
            self._committing = True
            if self._connection is not None:
                self._connection.interruptible = False
        try:
            self._call("receive_commit")
        except (ConnectionLost, TimedOut) as error:
            if not self._arrived(uuid, error):
                raise

    def _arrived(self, uuid: str, lost: errors.Exception) -> bool:
        """Whether the destination has the target, after the connection broke during the commit."""
        log.warning("migrate: %s; querying the destination for the outcome", lost)
        assert self._core.connect is not None
        try:
            connection = self._core.connect(self._address)
            try:
                request = PendingRequest("receive_outcome")
                header = [self._provider_id, "receive_outcome", [uuid], None]
                connection.submit(request, header)
                return bool(connection.wait(request))
            finally:
                connection.close(0)
        except errors.Exception as error:
            raise ConnectionLost(
                f"migrate: the connection was lost during the final commit ({lost}), and provider"
                f" {self._provider_id} at {self._address} cannot be queried ({error}): it may have"
                " the target too. This provider continues to serve it; make sure that only one"
                " does"
            ) from error

    def _leave(self, target: Target) -> None:
        """Close the migrated target; failures are only logged."""
        path = target.state.catalogue.path
        try:
            if self._options.remove_source and path is not None:
                # The catalogue first: without it there is no target any more; and closing
                # a target whose catalogue was removed removes its regions.
                path.unlink(missing_ok=True)
                sync_directory(path.parent)
            target.close()
        except (errors.Exception, OSError) as error:
            log.warning("migrate: closing the source's files at %s failed: %s", path, error)

    # Messages

    def _submit(self, name: str, *arguments: Any, payload: memoryview | None = None,
                size: int = 0) -> None:  # fmt: skip
        """Send a message; *payload* may be reused when this returns.  *size* counts as progress."""
        while len(self._pending) >= _AHEAD:
            self._take_reply()
        assert self._connection is not None
        if self._connection.interruptible:
            interrupts.check()
        request = PendingRequest(name)
        self._connection.submit(request, [self._provider_id, name, list(arguments), None], payload)
        self._pending.append((request, size))

    def _take_reply(self) -> Any:
        request, size = self._pending.popleft()
        assert self._connection is not None
        result = self._connection.wait(request)
        self._check_stopping()
        self.done += size
        if size:
            self._progress(self.done, self.total)
        return result

    def _call(self, name: str, *arguments: Any) -> Any:
        """Send a message and wait for its reply, and previous replies."""
        self._submit(name, *arguments)
        result = None
        while self._pending:
            result = self._take_reply()
        return result

    def _abort(self) -> None:
        """Notify the destination, so that another attempt is possible at once."""
        self._pending.clear()
        connection = self._connection
        if connection is not None and connection.usable:
            try:
                self._call("receive_abort")
            except errors.Exception as error:
                log.debug("receive_abort: %s", error)
