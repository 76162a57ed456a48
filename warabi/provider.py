"""What serves one provider ID."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from warabi import errors
from warabi.target import Target
from warabi.transfer import DefaultTransfers, Transfers

_THREADS = 16  # for asynchronous requests from the provider's own process


class ProviderCore:
    """What serves one provider ID: a target, or none yet.

    Attributes:
        provider_id: 0 to 65535.
        target: the target; operations fail with ``TargetNotFound`` without one.
        transfers: its transfer manager.
        abandoned: set when the last reference to the ``Provider`` object is gone.
    """

    def __init__(
        self, provider_id: int, target: Target | None, transfers: Transfers | None = None
    ) -> None:
        self.provider_id = provider_id
        self._target = target
        self.transfers = transfers or DefaultTransfers()
        self.abandoned = False
        self._pool: ThreadPoolExecutor | None = None

    def run_beside(self, work: Callable[[], None]) -> None:
        """Have *work*, which waits for the medium, done by a thread; before :meth:`close` ends."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="warabi-async")
        self._pool.submit(work)

    @property
    def target(self) -> Target:
        if self._target is None:
            raise errors.TargetNotFound(f"provider {self.provider_id} has no target")
        return self._target

    def close(self) -> None:
        """Finish what runs beside and close the target.  Idempotent."""
        if self._pool is not None:
            self._pool.shutdown()
        if self._target is not None:
            self._target.close()
