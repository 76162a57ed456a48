"""Waiting in a Trio task while another thread holds a target's lock for long.

An event loop must not wait for that lock itself, or all that it serves would wait, too; nor should
each request that waits for it take a worker thread.  What makes a target ``occupied``, and for how
long: ``target/state.py``.
"""

from __future__ import annotations

import trio

from warabi.target.target import Target

_SHORTEST, _LONGEST = 0.001, 0.02  # seconds between two looks


async def wait_free(target: Target) -> None:
    """Return when nothing holds the lock of *target* for long.

    It looks from time to time: a lock is what tells it, since only that is given back whatever
    becomes of its holder.
    """
    pause = _SHORTEST
    while target.occupied:
        await trio.sleep(pause)
        pause = min(2 * pause, _LONGEST)
