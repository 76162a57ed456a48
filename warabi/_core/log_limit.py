"""A rate limit for log messages, so that a peer cannot fill the log.

``logger.addFilter(RateLimit())`` limits the messages of a logger per format string: a burst, and
then one per interval.  The next message that is logged tells how many were omitted.
"""

from __future__ import annotations

import logging
import threading
import time

BURST = 20
"""Messages of one format that are logged without delay."""
INTERVAL = 5.0
"""Seconds after which one more message is logged."""


class _Bucket:
    """The token bucket of one format."""

    __slots__ = ("left", "omitted", "since")

    def __init__(self, now: float) -> None:
        self.left = float(BURST)
        self.since = now
        self.omitted = 0


class RateLimit(logging.Filter):
    """A filter of one logger."""

    def __init__(self) -> None:
        super().__init__()
        self._buckets: dict[str, _Bucket] = {}  # by format string, a small set
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        with self._lock:
            bucket = self._buckets.get(record.msg)
            if bucket is None:
                bucket = self._buckets[record.msg] = _Bucket(now)
            bucket.left = min(BURST, bucket.left + (now - bucket.since) / INTERVAL)
            bucket.since = now
            if bucket.left < 1:
                bucket.omitted += 1
                return False
            bucket.left -= 1
            omitted, bucket.omitted = bucket.omitted, 0
        if omitted:
            record.msg = f"{record.msg} ({omitted} similar messages omitted)"
        return True
