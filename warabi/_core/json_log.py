"""Log messages as JSON, one object in each line, for log collectors."""

from __future__ import annotations

import datetime
import json
import logging

FORMATS = ("text", "json")
"""Values of the settings that choose a format."""


class JsonFormatter(logging.Formatter):
    """Formats a record as ``time`` (UTC, ISO 8601), ``level``, ``logger``, ``message``, ``pid``,
    and ``exception``, a traceback, if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        found = {
            "time": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
        }
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found)
