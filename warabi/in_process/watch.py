"""Waiting for changes of a target in a Trio loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import trio

from warabi._core.changes import Changes
from warabi._core.tuning import WATCH_CHECK, WATCH_POLL
from warabi.metadata.notifications import Subscription
from warabi.target.target import Target

_SHARE = 20


class Watching:
    """The watch state of one connection, or one program.

    Args:
        origin: whose changes are omitted; None: none are.
    """

    def __init__(self, origin: object | None) -> None:
        self._origin = origin if origin is not None else self
        self._target: Target | None = None
        self._subscription: Subscription | None = None
        self._number = 0  # number of the last reply
        self._turn = 0  # number of the pending query
        self._woken = trio.Event()
        self._over = False

    async def changes(self, find: Callable[[], Target], number: int, new_names: bool) -> Changes:
        """Wait for changes since the reply *number*.

        The first reply, and one after a lost reply, is that everything may have changed.  A later
        query, and :meth:`end`, complete a pending one with an empty reply.

        Args:
            find: returns the target; raises if it is gone.
            number: of the last reply received, 0 for none.
            new_names: whether to include names that did not exist before.
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
            with trio.move_on_after(
                max(WATCH_POLL, pause) if target.sharing.active else WATCH_CHECK
            ):
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
        """Complete pending and later queries at once."""
        self._over = True
        self._woken.set()

    def end(self) -> None:
        """The same as :meth:`finish`; there are no later queries."""
        self.finish()
        self._unsubscribe()
