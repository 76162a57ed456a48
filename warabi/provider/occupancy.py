"""Operations that hold a target's lock for long, without holding the provider's event loop.

A survey tells of all names as of one instant, and a graft makes all of its names or none, so each
holds the target's lock for as long as it takes, in a worker thread.  What the loop would do with
the target meanwhile would wait for that lock, and so would everybody else: it waits here, in tasks.

Used from one Trio loop; nothing here is thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from warabi.target.target import Target


class Occupancy:
    """Whether one operation has a provider's target for itself.

    Attributes:
        busy: one has.
    """

    def __init__(self) -> None:
        self.busy = False
        self._free = trio.Event()

    @contextmanager
    def hold(self, target: Target) -> Iterator[None]:
        """Have the target for the block; nothing else has."""
        assert not self.busy
        self.busy = target.occupied = True
        self._free = trio.Event()
        try:
            yield
        finally:
            self.busy = target.occupied = False
            self._free.set()

    async def wait_free(self) -> None:
        """Return when nothing has the target; it is a checkpoint only where something has."""
        while self.busy:
            await self._free.wait()
