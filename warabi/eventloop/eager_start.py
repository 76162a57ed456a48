"""Continuing coroutines that the current task started directly to see whether they block.

Most do not.  One that does is continued in the same task, since what it waits for, and deadlines,
refer to that task.
"""

from __future__ import annotations

import types
from collections.abc import Coroutine, Generator
from typing import Any, TypeVar

_T = TypeVar("_T")


@types.coroutine
def continued(coroutine: Coroutine[Any, Any, _T], step: Any) -> Generator[Any, Any, _T]:
    """Await the rest of *coroutine*, which this task started and which yielded *step*."""
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
