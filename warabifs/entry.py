"""Where the commands start: says what is missing when only the client was installed."""

from __future__ import annotations

import sys


def mount() -> None:
    """``mount.warabifs``."""
    try:
        from warabifs.mount import main
    except ModuleNotFoundError as error:
        if error.name != "pyfuse3":
            raise
        sys.exit(
            "mount.warabifs: the Python package pyfuse3 is not installed;"
            " pip install 'warabifs[mount]' brings it"
        )
    main()
