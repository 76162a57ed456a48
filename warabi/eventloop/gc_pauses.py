"""Bounds how long Python's garbage collector stops a process that has many objects.

A full collection visits every object, 0.1 s or more for a million, and all threads wait for it.
Mounts and providers have objects for each inode, name and region that is in use, and make hardly
any reference cycles.  So what survives a full collection that took long is *frozen*: later
collections do not visit it.  Frozen objects are freed as others are, with the last reference to
them; only cycles that were still in use then, and become garbage later, are not found any more.
"""

from __future__ import annotations

import gc
from time import perf_counter

_THRESHOLDS = (10_000, 5, 5)
"""New objects before the youngest are looked through, and how often before older ones are, too.

Requests leave no cycles behind: to look for some after every 700 objects is in vain.  A full
collection visits some 300,000 objects that are not frozen.
"""
_LONG = 0.02  # seconds


class PauseLimit:
    """A callback of the collector that freezes what survives long collections.

    Args:
        long: seconds.
    """

    def __init__(self, long: float) -> None:
        self._long = long
        self._began = 0.0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began = perf_counter()
        elif info["generation"] == 2 and perf_counter() - self._began > self._long:
            gc.freeze()


def limit_pauses(long: float = _LONG) -> None:
    """Have full collections that take longer than *long* seconds be the last of their objects.

    For processes that do nothing but serve: it changes the collector of the whole process.
    """
    if not any(isinstance(callback, PauseLimit) for callback in gc.callbacks):
        gc.set_threshold(*_THRESHOLDS)
        gc.callbacks.append(PauseLimit(long))
