"""A progress bar on a terminal; elsewhere, and without the package ``rich``, nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show how much of *total* bytes is done while the block runs, on standard error.

    The block calls what it is given with the number of bytes that were done since the last call.
    """
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        show(done, total)

    with overall_progress(what) as show:
        show(0, total)
        yield advance


@contextmanager
def overall_progress(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """As :func:`progress`; what the block calls takes the bytes that are done, and those of all."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    try:
        from rich import progress as bars
        from rich.console import Console
    except ImportError:
        yield lambda done, total: None
        return
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(binary_units=True),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
