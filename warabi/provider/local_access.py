"""Direct access from a provider's own process: like a guest's, without a connection."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from warabi import errors
from warabi._core import forks, interrupts
from warabi.backends.base import THIS_PROCESS
from warabi.region import RegionID
from warabi.shm.client import DirectAccess, Guest, available

if TYPE_CHECKING:
    from warabi.provider.core import ProviderCore
    from warabi.target import leases
    from warabi.target.target import Target


class LocalAccess(DirectAccess):
    """Reads and writes regions like a :class:`Guest`: False if the target must be called.

    Each provider has one, created on first use, which ends with the target.

    Args:
        core: the provider.
    """

    def __init__(self, core: ProviderCore) -> None:
        super().__init__()
        self._core = core
        self._lock = forks.lock()  # held while requesting a grant
        self._target: Target | None = None  # the target that it has joined
        self._holder: leases.GrantHolder | None = None
        self._accesses = 0
        forks.register(self)

    def _forked(self) -> None:
        self.guest = self._holder = None

    def _asked(self, what: str, region: RegionID, size: int, wait: bool) -> Guest | None:
        return None if self._lock.locked() else interrupts.uninterrupted(self._ask, region, size)

    def _ask(self, region: RegionID, size: int) -> Guest | None:
        held = False
        try:
            (held,) = map(self._lock.acquire, (False,))
            if not held:
                return None
            target = self._core.target
            guest = self.guest
            if target is not self._target:
                self._accesses += 1
                guest = self.guest = self._join(target) if self._accesses > 1 else None
            if guest is None or self._holder is None or not guest.wants(region, size):
                return None
            granted = target.grant(region, THIS_PROCESS, writable=target.shares_writes, wait=False)
            if granted is None:
                guest.add(region, None, [])
            else:
                guest.add(region, *granted.answer(self._holder))
            return guest
        except (errors.Exception, errors.WouldBlock, OSError):
            return None  # the caller's next step reports the error
        finally:
            if held:
                self._lock.release()

    def _join(self, target: Target) -> Guest | None:
        self._target = target
        joined = target.sharing.join() if available() else None
        if joined is None:
            return None
        self._holder, shared = joined
        write_times = shared.write_times if target.shares_writes else shared.table
        # The table's first word serves as the liveness word.
        shown = (shared.table, shared.table, write_times, self._holder.hazards)
        guest = Guest([0, 1, target.shares_writes], [os.dup(memory.fd) for memory in shown])
        shared.on_withdraw, shared.on_forget = guest.drop_grant, guest.forget
        return guest
