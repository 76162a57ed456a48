"""Waiting, in a Trio loop, for what changes in a target."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import trio

from warabi._core.changes import Changes
from warabi.metadata.notifications import Subscription
from warabi.target.target import Target

_LOOK = 0.05
"""Seconds between looks at what guests wrote, of which nobody tells; ``_SHARE`` times what a look
took of the processor, if that is more.  How long it had to wait says nothing about the next."""
_CHECK = 1.0
"""Seconds between looks whether it is still the same target, while there are no guests."""
_SHARE = 20


class Watching:
    """What one connection, or one program, watches.

    Args:
        origin: whose changes are not told; None: all are.
    """

    def __init__(self, origin: object | None) -> None:
        self._origin = origin if origin is not None else self
        self._target: Target | None = None
        self._subscription: Subscription | None = None
        self._number = 0  # of the last answer
        self._turn = 0  # of the question that is waiting
        self._woken = trio.Event()
        self._over = False

    async def changes(self, find: Callable[[], Target], number: int, new_names: bool) -> Changes:
        """What changed since the answer *number*; waits until something did.

        The first answer, and one after an answer that was lost, is that everything may have.  A
        later question, and :meth:`end`, have one that waits answered with nothing.

        Args:
            find: gives the target; raises when it is gone.
            number: of the last answer that came, 0 for none.
            new_names: whether names that meant nothing before are told, too.
        """
        self._turn += 1
        turn = self._turn
        self._woken.set()
        pause = 0.0
        while not self._over and self._turn == turn:
            subscription = self._subscribed(find(), new_names)
            if number != self._number:
                subscription.suspect_everything()
                number = self._number
            found = subscription.take(self._number + 1)
            if found is not None:
                self._number = found.number
                return found
            target = self._target
            assert target is not None
            self._woken = trio.Event()
            with trio.move_on_after(max(_LOOK, pause) if target.sharing.active else _CHECK):
                await self._woken.wait()
            began = time.thread_time()
            target.sharing.look()
            pause = _SHARE * (time.thread_time() - began)
        return Changes(self._number, False, {}, {})

    def _subscribed(self, target: Target, new_names: bool) -> Subscription:
        if self._subscription is None or self._target is not target:
            self._unsubscribe()
            token = trio.lowlevel.current_trio_token()
            wake = partial(token.run_sync_soon, self._wake, idempotent=True)
            self._target = target
            self._subscription = target.feed.subscribe(self._origin, new_names, wake)
        return self._subscription

    def _wake(self) -> None:
        self._woken.set()

    def _unsubscribe(self) -> None:
        if self._subscription is not None and self._target is not None:
            self._target.feed.unsubscribe(self._subscription)
        self._subscription = self._target = None

    def finish(self) -> None:
        """Answer who waits, and who asks later, at once."""
        self._over = True
        self._woken.set()

    def end(self) -> None:
        """As :meth:`finish`; nobody asks any more."""
        self.finish()
        self._unsubscribe()
