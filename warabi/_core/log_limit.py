"""A rate limit for log messages, so that a peer cannot fill the log.

``logger.addFilter(RateLimit())`` limits the messages of a logger per format string, and per place
where an exception that is logged was raised: a burst, and then one per interval.  The next message
that is logged tells how many were omitted.
"""

from __future__ import annotations

import logging
import time

from warabi._core import forks
from warabi._core.tuning import LOG_INTERVAL

BURST = 20
"""Messages of one format that are logged without delay."""


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
        self._buckets: dict[tuple[object, ...], _Bucket] = {}  # few: the code bounds the keys
        self._lock = forks.lock()

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        key = (record.msg, *_raised_at(record))
        with self._lock:
            bucket = self._buckets.get(key)
            if bucket is None:
                bucket = self._buckets[key] = _Bucket(now)
            bucket.left = min(BURST, bucket.left + (now - bucket.since) / LOG_INTERVAL)
            bucket.since = now
            if bucket.left < 1:
                bucket.omitted += 1
                return False
            bucket.left -= 1
            omitted, bucket.omitted = bucket.omitted, 0
        if omitted:
            record.msg = f"{record.msg} ({omitted} similar messages omitted)"
        return True


def _raised_at(record: logging.LogRecord) -> tuple[object, ...]:
    """Return the type of the exception in *record*, if any, and the line that raised it."""
    if not record.exc_info or record.exc_info[1] is None:
        return ()
    error = record.exc_info[1]
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return (type(error),)
    return type(error), trace.tb_frame.f_code.co_filename, trace.tb_lineno
