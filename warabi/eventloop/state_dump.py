"""Dumps of a process's state to its log at SIGUSR1: for a process that hangs, or is slow.

A dump has a report of the process's state, what each thread executes, and the tasks of its Trio
loops, each with the calls that it waits in.  A thread makes it, so that it is made even if a loop
is held: it has the threads then, and says that the loop does not answer.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import trio

from warabi._core import forks
from warabi._core.tuning import DUMP_PATIENCE

log = logging.getLogger(__name__)
_MOST_TASKS = 1000


def tasks(task: trio.lowlevel.Task | None = None, depth: int = 0) -> Iterator[str]:
    """Yield a line for each task of this thread's Trio loop, indented below that which started
    it: its name, and the calls that it waits in, innermost first."""
    task = task or trio.lowlevel.current_root_task()
    if task is None:
        return
    calls = [
        f"{frame.f_code.co_qualname} ({frame.f_code.co_filename.rpartition('/')[2]}:{line})"
        for frame, line in _awaiting(task)
    ]
    yield f"{'  ' * depth}{task.name}: {' < '.join(reversed(calls)) or 'running'}"
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield from tasks(child, depth + 1)


def _awaiting(task: trio.lowlevel.Task) -> Iterator[tuple[Any, int]]:
    with contextlib.suppress(TypeError, AttributeError):  # what it awaits is no coroutine of Python
        for frame, line in task.iter_await_frames():
            if not frame.f_code.co_filename.rpartition("/trio/")[1]:
                yield frame, line


def loop_tasks(token: trio.lowlevel.TrioToken) -> list[str]:
    """Return the tasks of another thread's loop, at most 1000 of them."""
    found: list[str] = []
    answered = forks.event()

    def collect() -> None:
        for line in tasks():
            if len(found) == _MOST_TASKS:
                found.append("...")
                break
            found.append(line)
        answered.set()

    try:
        token.run_sync_soon(collect)
    except trio.RunFinishedError:
        return ["the loop has ended"]
    if not answered.wait(DUMP_PATIENCE):
        return [f"the loop does not answer within {DUMP_PATIENCE:g} s: see its thread"]
    return found


def threads() -> Iterator[str]:
    """Yield what each thread executes."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for number, frame in sys._current_frames().items():
        yield f"thread {names.get(number, number)}:"
        for entry in traceback.format_stack(frame):
            yield from entry.rstrip().splitlines()


@contextmanager
def at_signal(
    report: Callable[[], dict[str, Any]],
    loops: Callable[[], dict[str, trio.lowlevel.TrioToken]],
) -> Iterator[None]:
    """Log a dump whenever SIGUSR1 arrives during the block; for the main thread.

    Args:
        report: returns the state of the process; called in a thread.
        loops: returns the process's Trio loops by name.
    """
    busy = forks.lock()

    def dump() -> None:
        try:
            try:
                _log_lines(threads())
                for name, token in loops().items():
                    _log_lines([f"tasks of {name}:", *(f"  {line}" for line in loop_tasks(token))])
            finally:
                busy.release()
            # It may wait for what hangs, and does not keep further dumps from being made.
            _log_lines(json.dumps(report(), indent=1).splitlines())
        except Exception:
            log.exception("the state could not be logged")

    def begin(number: int, frame: object) -> None:
        if busy.acquire(blocking=False):  # another dump is being made
            _thread.start_new_thread(dump, ())

    before = signal.signal(signal.SIGUSR1, begin)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def _log_lines(lines: Iterable[str]) -> None:
    for line in lines:
        log.warning("state: %s", line)
