"""Coroutines that a task begins by itself, to see whether they wait for anything.

Most do not.  One that does is carried on by the task that began it, for what it waits for knows
that task, as do its deadlines.
"""

from __future__ import annotations

import types
from collections.abc import Coroutine, Generator
from typing import Any, TypeVar

_T = TypeVar("_T")


@types.coroutine
def continued(coroutine: Coroutine[Any, Any, _T], step: Any) -> Generator[Any, Any, _T]:
    """Await the rest of *coroutine*, which this task began, and which waits for *step*."""
    while True:
        failure: BaseException | None = None
        try:
            received = yield step
        except BaseException as error:
            failure = error
        try:
            step = coroutine.send(received) if failure is None else coroutine.throw(failure)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
