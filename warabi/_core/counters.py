"""Counters of operations: how many, how long, how many bytes, which errors, and the slowest ones.

Counting one operation is two additions to a list, with neither a lock nor a system call.  One
thread counts, that of the event loop; other threads read, and may see an operation whose duration
has not been added yet.

Durations are counted in a histogram whose bucket *n* has those of less than 2**n nanoseconds, and
of no less than half of that: the error of a quantile is at most a factor of 2 over the whole range.
"""

from __future__ import annotations

import errno
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from warabi import errors

BUCKETS = 64
"""Number of buckets; the last one has durations of 2**62 ns and more."""
_TIME, _BYTES = BUCKETS, BUCKETS + 1
_FAILURES = 50
"""Number of recent failures that are kept."""
_SLOWEST = 20
_SLOW_FOR = 600.0
"""Seconds for which a slow operation is kept."""
_LONGEST = 200
"""Most characters of a message that are kept: a peer may have caused it."""


class Failure(NamedTuple):
    """An operation that failed: seconds since the epoch, its name, the kind of the error, its
    message, and the client, if known."""

    time: float
    operation: str
    error: str
    message: str
    client: str


class Slow(NamedTuple):
    """A slow operation: seconds since the epoch when it ended, its name, and its duration in
    seconds."""

    time: float
    operation: str
    seconds: float


class Totals(NamedTuple):
    """Numbers of operations, of failures, and of bytes that were transferred."""

    operations: int
    failures: int
    size: int


Key = str | int
"""What names an operation where it is counted."""


class _Rows(dict[Key, list[int]]):
    """Buckets, sum of durations in ns, and bytes of each operation; made when first counted."""

    def __missing__(self, key: Key) -> list[int]:
        row = self[key] = [0] * (BUCKETS + 2)
        return row


def kind_of(error: BaseException) -> str:
    """Return the kind of an error for counters: the name of its errno, or else of its class."""
    number = error.errno if isinstance(error, OSError) else None
    return errno.errorcode.get(number or 0, type(error).__name__)


class Counters:
    """Counters of the operations of a target, or of a mount.

    Args:
        name_of: returns the name of an operation, given the key with which it is counted.

    Attributes:
        failures: the last failures, oldest first, without those that concern names and attributes
            only (:class:`~warabi.errors.PathError`), which programs cause all the time.
    """

    def __init__(self, name_of: Callable[[Any], str] = str) -> None:
        self._name_of = name_of
        self._rows = _Rows()
        self._errors: Counter[tuple[Key, str]] = Counter()
        self.failures: deque[Failure] = deque(maxlen=_FAILURES)
        self._slow: list[Slow] = []
        self._slower = 0  # ns of the fastest of the slowest operations, if these are complete

    def add(self, key: Key, took: int) -> None:
        """Count an operation that took *took* ns."""
        row = self._rows[key]
        row[took.bit_length()] += 1
        row[_TIME] += took
        if took > self._slower:
            self._note_slow(key, took)

    def add_bytes(self, key: Key, size: int) -> None:
        """Count *size* bytes that an operation transferred."""
        self._rows[key][_BYTES] += size

    def add_error(self, key: Key, kind: str) -> None:
        """Count a failure of an operation by its kind only, in addition to :meth:`add`."""
        self._errors[key, kind] += 1
        _ = self._rows[key]

    def fail(self, key: Key, error: BaseException, client: str = "") -> None:
        """Count a failure of an operation, in addition to :meth:`add`."""
        kind = kind_of(error)
        self.add_error(key, kind)
        if not isinstance(error, errors.PathError):
            message = str(error)[:_LONGEST]
            self.failures.append(Failure(time.time(), self._name_of(key), kind, message, client))

    def _note_slow(self, key: Key, took: int) -> None:
        now = time.time()
        kept = [slow for slow in self._slow if slow.time > now - _SLOW_FOR]
        kept.append(Slow(now, self._name_of(key), took / 1e9))
        kept.sort(key=lambda slow: -slow.seconds)
        self._slow = kept = kept[:_SLOWEST]
        self._slower = int(kept[-1].seconds * 1e9) if len(kept) == _SLOWEST else 0

    def slowest(self) -> list[Slow]:
        """Return the slowest operations of the last ten minutes, slowest first."""
        since = time.time() - _SLOW_FOR
        found = self._slow
        kept = [slow for slow in found if slow.time > since]
        if len(kept) < len(found):
            self._slower = 0  # the next operation has the list made again
        return kept

    def totals(self) -> Totals:
        """Return what was counted of all operations together."""
        rows = list(self._rows.values())
        return Totals(
            sum(sum(row[:BUCKETS]) for row in rows),
            sum(self._errors.copy().values()),
            sum(row[_BYTES] for row in rows),
        )

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Return all counters, as JSON can have them: for each operation ``count``, ``seconds``,
        ``bytes``, ``errors`` by kind, and ``buckets``, pairs of an upper bound in seconds and the
        number of operations below it and not below the one before."""
        failed: dict[Key, dict[str, int]] = {}
        for (key, kind), number in sorted(self._errors.copy().items(), key=lambda item: item[0][1]):
            failed.setdefault(key, {})[kind] = number
        found = {}
        for key, row in self._rows.copy().items():
            counts = row[:BUCKETS]
            found[self._name_of(key)] = {
                "count": sum(counts),
                "seconds": row[_TIME] / 1e9,
                "bytes": row[_BYTES],
                "errors": failed.get(key, {}),
                "buckets": [[2**i / 1e9, count] for i, count in enumerate(counts) if count],
            }
        return dict(sorted(found.items()))


def quantile(buckets: Iterable[tuple[float, int]], share: float) -> float:
    """Return the duration, in seconds, below which a *share* (0 to 1) of the operations in
    *buckets*, as in a snapshot, were; interpolated within a bucket.  0 without operations."""
    pairs = list(buckets)
    wanted = share * sum(count for _, count in pairs)
    for bound, count in pairs:
        if wanted <= count:
            return bound / 2 * (1 + wanted / count)
        wanted -= count
    return 0.0
