"""Numbers with units, as people read them."""

from __future__ import annotations


def shown_bytes(size: float) -> str:
    """Return a number of bytes with three digits and a binary unit: ``1.23 MiB``."""
    if size < 1000:
        return f"{size:.0f} B"
    units = iter(("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))
    unit = next(units)
    size /= 1024
    while size >= 999.5 and unit != "EiB":
        unit = next(units)
        size /= 1024
    return f"{_three_digits(size)} {unit}"


def shown_seconds(seconds: float) -> str:
    """Return a duration with three digits, from µs to s, or as hours and minutes."""
    if seconds < 1e-3:
        return f"{_three_digits(seconds * 1e6)} µs"
    if seconds < 1:
        return f"{_three_digits(seconds * 1e3)} ms"
    if seconds < 120:
        return f"{_three_digits(seconds)} s"
    minutes = int(seconds // 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _three_digits(number: float) -> str:
    digits = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:.{digits}f}"
