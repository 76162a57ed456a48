"""Waiting in a Trio task while another thread holds a target's lock for long.

An event loop must not wait for that lock itself, which would block everything it serves; nor should
each waiting request occupy a worker thread.  ``region_locks.py`` explains when a target is
``occupied``, and for how long.
"""

from __future__ import annotations

import trio

from warabi._core.tuning import OCCUPIED_POLL
from warabi.target.target import Target


async def wait_free(target: Target) -> None:
    """Return when the lock of *target* is not held for long.

    Polls, since the state is a lock, which is released whatever happens to its holder.
    """
    pause, longest = OCCUPIED_POLL
    while target.occupied:
        await trio.sleep(pause)
        pause = min(2 * pause, longest)
