"""Entry point for mount(8) and umount(8):
``python -m warabifs.mount.helper mount|umount ARGUMENT...``."""

from __future__ import annotations

import sys

from warabifs.mount import unmount


def main(arguments: list[str]) -> None:
    """Exit with the status that mount(8) and umount(8) pass on."""
    what, *rest = arguments
    if what == "umount":
        sys.exit(unmount.main(rest))
    from warabifs.mount.main import main as mount  # imported late: unmounting does not need it

    mount(rest, helper=True)


if __name__ == "__main__":
    main(sys.argv[1:])
