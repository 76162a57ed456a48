"""What mount(8) and umount(8) call: ``python -m warabifs.mount.helper mount|umount
ARGUMENT...``."""

from __future__ import annotations

import sys

from warabifs.mount import unmount


def main(arguments: list[str]) -> None:
    """Ends the process with the exit status that mount(8) and umount(8) pass on."""
    what, *rest = arguments
    if what == "umount":
        sys.exit(unmount.main(rest))
    from warabifs.mount.main import main as mount  # not earlier: unmounting needs none of it

    mount(rest, helper=True)


if __name__ == "__main__":
    main(sys.argv[1:])
