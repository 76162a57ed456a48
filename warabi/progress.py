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
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    try:
        from rich import progress as bars
        from rich.console import Console
    except ImportError:
        yield lambda count: None
        return
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(binary_units=True),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=total)
        yield lambda count: shown.advance(task, count)
