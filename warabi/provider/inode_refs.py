"""What one connection holds of a tree of names: inodes that must not go while it knows them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import trio

from warabi import errors
from warabi.local.occupancy import wait_free
from warabi.provider.core import ProviderCore

log = logging.getLogger(__name__)

_TURN = 100
"""Inodes that are unpinned before other tasks get a turn."""


class Pins:
    """How often the connection has pinned which inode of which provider."""

    def __init__(self) -> None:
        self._held: Counter[tuple[int, int]] = Counter()

    def check(self, provider_id: int, ino: int, count: int) -> None:
        """Return if the connection may unpin *ino* so often.

        Raises:
            OutOfBounds: it holds it less often; others, who do, would lose it.
        """
        held = self._held[provider_id, ino]
        if not 0 < count <= held:
            raise errors.OutOfBounds(
                f"unpin of inode {ino}: {count} times, but only {held} are held"
            )

    def note(self, provider_id: int, ino: int, count: int) -> None:
        """*ino* was pinned *count* times, or unpinned when that is negative."""
        self._held[provider_id, ino] += count
        if not self._held[provider_id, ino]:
            del self._held[provider_id, ino]

    async def give_back(self, find: Callable[[int], ProviderCore]) -> None:
        """Unpin everything; *find* gives the provider of an ID.

        Runs to its end also where it is cancelled, and lets others run meanwhile.
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
