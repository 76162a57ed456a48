"""Fields of files such as ``/proc/self/mountinfo``."""

from __future__ import annotations

import re

_ESCAPE = re.compile(rb"\\([0-7]{3})")


def unescaped(field: bytes) -> bytes:
    """Replace the octal escapes, which stand for blanks and backslashes."""
    return _ESCAPE.sub(lambda found: bytes((int(found[1], 8),)), field)
