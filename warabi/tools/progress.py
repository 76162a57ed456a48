"""Progress on a terminal; no effect elsewhere, or without the package ``rich``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_NARROW = 60
"""Columns of a terminal from which a bar fits, too."""


@contextmanager
def progress(
    what: str, total: int | None, *, hidden: bool = False
) -> Iterator[Callable[[int], None]]:
    """Show the progress of *total* bytes on standard error, for the duration of the block.

    The block calls the yielded function with the number of bytes done since the last call.  Nothing
    is shown if it is *hidden*, as of data that go to the same terminal.
    """
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        show(done, total)

    with overall_progress(what, hidden=hidden) as show:
        show(0, total)
        yield advance


@contextmanager
def overall_progress(
    what: str, *, hidden: bool = False
) -> Iterator[Callable[[int, int | None], None]]:
    """The same as :func:`progress`; the yielded function takes the bytes done, and the total."""
    if hidden or sys.stderr is None or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    try:
        from rich import progress as bars
        from rich.console import Console
    except ImportError:
        yield lambda done, total: None
        return
    console = Console(stderr=True)
    wide = console.width >= _NARROW
    columns = (
        bars.TextColumn("{task.description}"),
        *((bars.BarColumn(), bars.DownloadColumn(binary_units=True)) if wide else ()),
        *(() if wide else (bars.TaskProgressColumn(),)),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(compact=not wide),
    )
    with bars.Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(what, total=None)
        (bar,) = shown.tasks

        def show(done: int, total: int | None) -> None:
            # As arguments of update, a total that grows would make rich forget the rate.
            bar.total, bar.finished_time = total, None
            shown.update(task, completed=done)

        yield show
