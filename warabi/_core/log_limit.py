"""Limits how often a log message is written, so that a peer cannot fill the log.

``logger.addFilter(RateLimit())`` limits every message of a logger, each by its format: some at
once, and then one in a while.  The next one that is written says how many were left out.
"""

from __future__ import annotations

import logging
import threading
import time

BURST = 20
"""Messages of one format that are written at once."""
INTERVAL = 5.0
"""Seconds after which one more is."""


class _Bucket:
    """What is left of one format's messages."""

    __slots__ = ("left", "omitted", "since")

    def __init__(self, now: float) -> None:
        self.left = float(BURST)
        self.since = now
        self.omitted = 0


class RateLimit(logging.Filter):
    """A filter of one logger."""

    def __init__(self) -> None:
        super().__init__()
        self._buckets: dict[str, _Bucket] = {}  # by format, of which code has only so many
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
            record.msg = f"{record.msg} ({omitted} more like this were left out)"
        return True
