"""Turns off periodic commits and write throttling while system calls are counted.

A target commits by itself seconds after a change, and an event loop has threads make its writes for
a while after a slow one.  Both depend on timing, and not on the calls that are counted.
"""

from __future__ import annotations

from warabi.target import commit, write_throttle
from warabi.tools.cli import main as cli

_LATER = 3600
"""Seconds; no count takes so long."""


def steady() -> None:
    """Have this process do only what it is asked for, and whatever takes long, too."""
    vars(commit)["COMMIT_INTERVAL"] = _LATER
    vars(write_throttle)["SLOW_WRITE"] = _LATER * 10**9


def main() -> None:
    """The command ``warabi``, steady."""
    steady()
    cli.main()
