"""The measuring loop, its samples, and their statistics.  Times are in microseconds."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.usage import cpu_seconds

MICROSECONDS = "µs"
MEGABYTES = "MB of memory"
RESIDENT = "resident memory at the end"
"""A row of every section that has processes which serve: what they take after all the work."""


@dataclass
class Work:
    """Something to measure.

    Attributes:
        call: the timed function.
        begin: done when a round begins.
        before: done ahead of each call, not timed.
        after: done when a round is over.
        per: operations in a call.
        most: calls in a round, however fast they are.
        size: bytes that a call moves, for what a GiB costs; 0 if that says nothing.
        pids: other processes whose processor time counts as the call's.
    """

    call: Callable[[], object]
    begin: Callable[[], object] | None = None
    before: Callable[[], object] | None = None
    after: Callable[[], object] | None = None
    per: int = 1
    most: int = 1 << 30
    size: int = 0
    pids: Sequence[int] = ()


@dataclass
class Round:
    """What is kept of one round.

    Attributes:
        value: the median of the round's calls, or its rate.
        p99: of the calls; 0 where single calls were not timed.
        count: of calls.
        cpu: seconds of processor time for a GiB, of everybody concerned but the kernel's own
            threads; 0 where that says nothing.
    """

    value: float
    p99: float = 0.0
    count: int = 1
    cpu: float = 0.0


@dataclass
class Series:
    """What one subject took for one row, round by round."""

    row: str
    subject: str
    unit: str = MICROSECONDS
    rounds: list[Round] = field(default_factory=list)
    failure: str = ""

    @property
    def value(self) -> float:
        """The median of the rounds; NaN if there is none."""
        return _median(each.value for each in self.rounds)

    @property
    def p99(self) -> float:
        return _median(each.p99 for each in self.rounds)

    @property
    def cpu(self) -> float:
        return _median(each.cpu for each in self.rounds)

    @property
    def spread(self) -> float:
        """How far the rounds are apart, as a part of their median."""
        values = [each.value for each in self.rounds]
        return (max(values) - min(values)) / self.value if values and self.value else 0.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Series:
        return cls(**{**found, "rounds": [Round(**each) for each in found["rounds"]]})


def _median(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.median(found) if found else float("nan")


def percentile(ordered: Sequence[float], part: float) -> float:
    """Of samples in ascending order, the one that *part* of them do not exceed."""
    return ordered[min(len(ordered) - 1, max(0, int(len(ordered) * part)))]


def _timed(work: Work, budget: float) -> list[int]:
    clock, call, before = time.perf_counter_ns, work.call, work.before
    samples: list[int] = []
    end = clock() + int(budget * 1e9)
    while True:
        if before is not None:
            before()
        start = clock()
        call()
        stop = clock()
        samples.append(stop - start)
        if stop >= end or len(samples) >= work.most:
            return samples


def measure(work: Work, budget: float) -> Round:
    """Repeat *work* for *budget* seconds; its collector of garbage rests meanwhile."""
    gc.collect()
    gc.disable()
    try:
        if work.begin is not None:
            work.begin()
        used = time.process_time() + cpu_seconds(work.pids)
        samples = _timed(work, budget)
        used = time.process_time() + cpu_seconds(work.pids) - used
    finally:
        gc.enable()
        if work.after is not None:
            work.after()
    samples.sort()
    micro = 1000.0 * work.per
    return Round(
        value=percentile(samples, 0.5) / micro,
        p99=percentile(samples, 0.99) / micro,
        count=len(samples),
        cpu=used / (len(samples) * work.size) * (1 << 30) if work.size else 0.0,
    )
