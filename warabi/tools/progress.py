"""A progress bar on a terminal; no effect elsewhere, or without the package ``rich``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show the progress of *total* bytes on standard error, for the duration of the block.

    The block calls the yielded function with the number of bytes done since the last call.
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
    """The same as :func:`progress`; the yielded function takes the bytes done, and the total."""
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
