"""Gate that blocks changes of a provider's target while it is being migrated.

Every change through a provider passes its gate: requests in ``session.py``, calls in the process in
``remote/link.py``.  Processes with direct access do not pass it: ``pause_sharing`` revokes their
grants, so that they send requests.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable

import trio

from warabi._core import forks, interrupts
from warabi._core.tuning import FREEZE_CHECK, INTERRUPT_CHECK
from warabi.errors import ConnectionLost, TimedOut


class ChangeGate:
    """A context for a change: ``with gate``; entering waits until the gate is open.

    Thread-safe.  In a program's main thread it must be entered under ``interrupts.uninterrupted``.
    Entering first increments the count and then checks whether the gate is closed; closing first
    sets that and then checks the count: at least one sees the other, and an open gate needs no
    lock.
    """

    def __init__(self) -> None:
        self._inside: list[None] = []  # its length is the count; append and pop are atomic
        self._frozen = False  # modified with the lock held
        self._lock = forks.lock()  # innermost
        self._changed = forks.condition(self._lock)
        self._wakers: list[Callable[[], None]] = []  # wake waiting Trio tasks

    def __enter__(self) -> None:
        self._inside.append(None)
        if self._frozen:
            self.leave()
            self._enter_later()

    def _enter_later(self) -> None:
        while not self.enter_nowait():
            with self._lock:
                while self._frozen:
                    self._changed.wait(INTERRUPT_CHECK if interrupts.waits_held() else None)
                    interrupts.check()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._inside.pop()
        if self._frozen:
            self._tell()

    @property
    def frozen(self) -> bool:
        """Whether entering would wait."""
        return self._frozen

    def enter_nowait(self) -> bool:
        """Enter if the gate is open; whether it was."""
        self._inside.append(None)
        if self._frozen:
            self.leave()
            return False
        return True

    async def enter(self) -> None:
        """Enter, without blocking the loop."""
        while not self.enter_nowait():
            opened = trio.Event()
            token = trio.lowlevel.current_trio_token()

            wake = functools.partial(token.run_sync_soon, opened.set)
            with self._lock:
                if self._frozen:
                    self._wakers.append(wake)
                else:
                    opened.set()
            await opened.wait()

    def leave(self) -> None:
        """Leave, after :meth:`enter_nowait` or :meth:`enter`."""
        self._inside.pop()
        if self._frozen:
            self._tell()

    def _tell(self) -> None:
        with self._lock:
            self._changed.notify_all()

    def freeze(self, patience: float, stopped: Callable[[], bool]) -> None:
        """Close the gate and return when pending changes have ended; only one thread may do this.

        Raises:
            TimedOut: they have not ended after *patience* seconds; the gate is open again.
            ConnectionLost: *stopped* became true; the gate is open again.
        """
        deadline = time.monotonic() + patience
        with self._lock:
            assert not self._frozen
            self._frozen = True
            while self._inside:
                if stopped():
                    self._thaw()
                    raise ConnectionLost("migrate: the provider is being closed")
                if time.monotonic() > deadline:
                    self._thaw()
                    raise TimedOut(
                        f"migrate: {len(self._inside)} changes in progress did not end within"
                        f" {patience:g} s"
                    )
                self._changed.wait(FREEZE_CHECK)

    def thaw(self) -> None:
        """Open the gate."""
        with self._lock:
            self._thaw()

    def _thaw(self) -> None:
        self._frozen = False
        self._changed.notify_all()
        for wake in self._wakers:
            with contextlib.suppress(trio.RunFinishedError):  # the task has ended, too
                wake()
        self._wakers.clear()
