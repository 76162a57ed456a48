"""Quoting of names, which may have any bytes but NUL, in lines of text."""

from __future__ import annotations

import os
import re

_UNSAFE = re.compile(rb"[^A-Za-z0-9_@%+=:,./\x80-\xff-]")
_CONTROLS = {7: "\\a", 8: "\\b", 9: "\\t", 10: "\\n", 11: "\\v", 12: "\\f", 13: "\\r"}


def escaped(name: str) -> bytes:
    """Escape *name* for programs that read the output.

    Blanks, control characters, DEL and the backslash become a backslash and three octal digits, as
    in /proc/mounts; other bytes are unchanged.
    """
    return b"".join(
        b"\\%03o" % byte if byte <= 32 or byte in (92, 127) else bytes((byte,))
        for byte in os.fsencode(name)
    )


def shell_quoted(name: str) -> str:
    """Quote *name* for a terminal like ls(1): for the shell where necessary, without control
    characters and invalid text."""
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
    """Escape control characters of *text*, so that it is one line on a terminal."""
    return "".join(
        char if char.isprintable() or "\udc80" <= char <= "\udcff"
        else char.encode("unicode_escape").decode()
        for char in text
    )  # fmt: skip
