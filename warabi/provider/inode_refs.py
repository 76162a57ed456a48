"""Inode references of one connection, which keep inodes from being removed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import trio

from warabi import errors
from warabi.in_process.occupancy import wait_free
from warabi.provider.core import ProviderCore

log = logging.getLogger(__name__)

_TURN = 100
"""Inodes to unpin before other tasks get a turn."""


class Pins:
    """Pin counts of the connection by provider and inode."""

    def __init__(self) -> None:
        self._held: Counter[tuple[int, int]] = Counter()

    def check(self, provider_id: int, ino: int, count: int) -> None:
        """Check that the connection may unpin *ino* *count* times.

        Raises:
            OutOfBounds: it has fewer pins; other connections would lose theirs.
        """
        held = self._held[provider_id, ino]
        if not 0 < count <= held:
            raise errors.OutOfBounds(
                f"unpin of inode {ino}: {count} times, but only {held} are held"
            )

    def note(self, provider_id: int, ino: int, count: int) -> None:
        """Record *count* pins of *ino*, negative for unpinning."""
        self._held[provider_id, ino] += count
        if not self._held[provider_id, ino]:
            del self._held[provider_id, ino]

    async def give_back(self, find: Callable[[int], ProviderCore]) -> None:
        """Unpin everything; *find* returns the provider of an ID.

        Completes even if cancelled, and lets other tasks run.
        """
        for number, ((provider_id, ino), count) in enumerate(self._held.items()):
            try:
                target = find(provider_id).target
                if target.occupied:
                    with trio.CancelScope(shield=True):
                        await wait_free(target)
                target.namespace.unpin(ino, count)
            except errors.Exception as error:
                log.debug("unpin of inode %d: %s", ino, error)
            if number % _TURN == _TURN - 1:
                await trio.lowlevel.cancel_shielded_checkpoint()
        self._held.clear()
