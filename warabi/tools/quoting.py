"""How names, which may have any bytes but NUL, are written in lines of text."""

from __future__ import annotations

import os
import re

_UNSAFE = re.compile(rb"[^A-Za-z0-9_@%+=:,./\x80-\xff-]")
_CONTROLS = {7: "\\a", 8: "\\b", 9: "\\t", 10: "\\n", 11: "\\v", 12: "\\f", 13: "\\r"}


def escaped(name: str) -> bytes:
    """*name* without blanks and control characters, for programs to read.

    These, DEL and the backslash are a backslash and three octal digits, as in /proc/mounts; all
    other bytes are themselves.
    """
    return b"".join(
        b"\\%03o" % byte if byte <= 32 or byte in (92, 127) else bytes((byte,))
        for byte in os.fsencode(name)
    )


def shell_quoted(name: str) -> str:
    """*name* for a terminal, as ls(1) shows it there: quoted for the shell where that is needed,
    and without control characters or bytes that are no text."""
    raw = os.fsencode(name)
    if not _UNSAFE.search(raw) and name.isprintable():
        return name
    if name.isprintable():
        return f'"{name}"' if "'" in name and not set('"$`\\!') & set(name) else _single(name)
    text, odd, pieces = "", "", []
    for char in name:
        if char.isprintable():
            if odd:
                pieces.append(f"$'{odd}'")
                odd = ""
            text += char
        else:
            if text:
                pieces.append(_single(text))
                text = ""
            odd += "".join(_CONTROLS.get(b, f"\\{b:03o}") for b in os.fsencode(char))
    pieces.append(f"$'{odd}'" if odd else _single(text) if text else "")
    return "".join(pieces)


def _single(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def printable(text: str) -> str:
    """*text* in one line that a terminal shows as it is: control characters as escapes."""
    return "".join(
        char if char.isprintable() or "\udc80" <= char <= "\udcff"
        else char.encode("unicode_escape").decode()
        for char in text
    )  # fmt: skip
