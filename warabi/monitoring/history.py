"""The last minutes of a process's counters, for the plots of its status page."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

from warabi._core.counters import Totals
from warabi._core.tuning import SAMPLE_INTERVAL

_SAMPLES = 151
"""Samples that are kept: 5 minutes."""


class _Sample(NamedTuple):
    time: float
    totals: Totals


class Rates(NamedTuple):
    """What happened in a second, between two samples."""

    operations: float
    failures: float
    size: float


class History:
    """Samples of counters.

    Args:
        totals: returns the counters, in parts that are added up.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        totals: Callable[[], Iterable[Totals]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._totals = totals
        self._clock = clock
        self._samples: deque[_Sample] = deque(maxlen=_SAMPLES)

    def tick(self) -> None:
        """Take a sample if it is time for it; called more often than that."""
        now = self._clock()
        if not self._samples or now - self._samples[-1].time >= SAMPLE_INTERVAL:
            parts = [Totals(0, 0, 0), *self._totals()]
            self._samples.append(_Sample(now, Totals(*map(sum, zip(*parts, strict=True)))))

    def rates(self) -> list[Rates]:
        """Return the rates between the samples, oldest first; none is negative, also where a
        provider was closed, and its counters are not in the sum any more."""
        samples = list(self._samples)
        found = []
        for before, after in pairwise(samples):
            seconds = after.time - before.time
            changes = zip(before.totals, after.totals, strict=True)
            found.append(Rates(*(max(0, new - old) / seconds for old, new in changes)))
        return found
