"""The state of one provider: its target, configuration and migrations."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from warabi import errors
from warabi._core import forks
from warabi._core.counters import Counters
from warabi.provider.buffer_pool import DefaultTransfers, Transfers
from warabi.provider.freeze import ChangeGate
from warabi.provider.local_access import LocalAccess
from warabi.target.config import ProviderConfig
from warabi.target.target import Target

if TYPE_CHECKING:
    from warabi.provider.migration.exchange import Receiving
    from warabi.provider.migration.send import Sending
    from warabi.remote.connection import BlockingConnection

_THREADS = 16  # for asynchronous requests from the provider's own process


class ProviderCore:
    """A provider: a target, or none yet, under one provider ID.

    Attributes:
        provider_id: 0 to 65535.
        target: the target; operations fail with ``TargetNotFound`` without one.
        transfers: its transfer manager.
        abandoned: set when the last reference to the ``Provider`` object is dropped.
        config: its effective configuration, including that of its current target.
        changes: the gate that every change of the target passes.
        sending: the latest migration of its target to another provider, running or ended.
        receiving: the running migration to this provider.
        connect: opens a connection to an engine, for a migration.
        on_adopt: called after a target was received.
        direct: direct access to its regions from this process.
        counters: of the requests of clients; calls from this process are not counted.
    """

    def __init__(
        self, provider_id: int, target: Target | None, transfers: Transfers | None = None
    ) -> None:
        self.provider_id = provider_id
        self._target = target
        self.transfers = transfers or DefaultTransfers()
        self.abandoned = False
        self.config = ProviderConfig()
        self.changes = ChangeGate()
        self.counters = Counters()
        self.sending: Sending | None = None
        self.receiving: Receiving | None = None
        self.connect: Callable[[str], BlockingConnection] | None = None
        self.on_adopt: Callable[[ProviderCore], None] = lambda core: None
        self._lock = forks.lock()  # protects the target, and whether it is closed
        self._closed = False
        self._gone = ""  # reason why the target is gone
        self._parents: Target | None = None  # in a forked child
        self._pool: ThreadPoolExecutor | None = None
        self.direct = LocalAccess(self)
        self._pid = os.getpid()
        forks.register(self)

    def _forked(self) -> None:
        # Kept referenced: deallocating its contents would copy the parent's memory.
        self._parents, self._target = self._target, None
        self._gone = f"the target belongs to process {self._pid}, from which this one was forked"
        self.sending = self.receiving = self._pool = None

    def run_concurrently(self, work: Callable[[], None]) -> None:
        """Run *work*, which waits for stable storage, in a thread that ends before :meth:`close`
        does."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="warabi-async")
        self._pool.submit(work)

    @property
    def target(self) -> Target:
        target = self._target
        if target is None:
            raise errors.TargetNotFound(self._gone or f"provider {self.provider_id} has no target")
        return target

    @property
    def has_target(self) -> bool:
        return self._target is not None

    def check_open(self) -> None:
        """Raise ``ProviderNotFound`` if it is closed."""
        if self._closed:
            raise errors.ProviderNotFound(f"provider {self.provider_id} is closed")

    def begin_sending(self, sending: Sending) -> None:
        """Register *sending* as the only migration of the target to another provider.

        Raises:
            TargetNotFound, ProviderNotFound: there is no target.
            TargetBusy: another migration is in progress.
        """
        with self._lock:
            self.check_open()
            if self.sending is not None and not self.sending.ended:
                raise errors.TargetBusy(
                    f"migrate: the target of provider {self.provider_id} is already being migrated"
                )
            _ = self.target
            self.sending = sending

    def begin_receiving(self, receiving: Receiving) -> None:
        """Register *receiving* as the only migration to this provider.

        Raises:
            ConfigError: it already has a target.
            ProviderNotFound: it is closed.
            TargetBusy: another migration is in progress.
        """
        with self._lock:
            self.check_open()
            if self._target is not None:
                raise errors.ConfigError(
                    f"migrate: provider {self.provider_id} already has a target"
                )
            if self.receiving is not None:
                raise errors.TargetBusy(
                    f"migrate: provider {self.provider_id} is already receiving a target"
                )
            self.receiving = receiving

    def adopt(self, target: Target, config: ProviderConfig) -> None:
        """Serve a received *target*; if this provider is closed, closes the target and raises."""
        with self._lock:
            if not self._closed:
                self._target, self.config, self._gone = target, config, ""
        if self._closed:
            target.close()
            self.check_open()
        self.on_adopt(self)

    def give_up(self, reason: str) -> Target:
        """Stop serving the target; operations raise ``TargetNotFound`` with *reason*.

        Returns:
            the target, which the caller must close.
        """
        with self._lock:
            target = self.target
            target.say_closed(reason)
            self.config = self.config.model_copy(update={"target": None})
            self._target, self._gone = None, reason
        return target

    def close(self) -> None:
        """Stop migrations, wait for background threads and close the target.  Idempotent."""
        with self._lock:
            self._closed = True
        if self.sending is not None:
            self.sending.stop()
        if self._pool is not None:
            self._pool.shutdown()
        if self._target is not None:
            self._target.close()
