"""Where the commands start: says what is missing when only the client was installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def mount(arguments: Sequence[str] | None = None, *, helper: bool = False) -> None:
    """``mount.warabifs``; *helper*: called by mount(8)."""
    try:
        from warabifs.mount import main
    except ModuleNotFoundError as error:
        if error.name != "pyfuse3":
            raise
        sys.exit(
            "mount.warabifs: the Python package pyfuse3 is not installed;"
            " pip install 'warabifs[mount]' brings it"
        )
    main(arguments, helper=helper)
