"""Connections on which nothing is under way, all served by one task.

A turn of Trio's loop for each request of each connection would cost as much as the request.  So
connections whose own tasks have nothing to do *stand* here, in one epoll(7), and one task, the
leader, serves those on which something has come, one request of each in turn.  What it begins
mostly ends without waiting.  What does wait is carried on by the task that began it, while another
one leads; then that connection's own task goes on.

The own task is parked meanwhile, until what was begun for it has ended, so two tasks never serve
one connection.  Who cancels it cancels what was begun.

When nothing has come, the leader looks for a moment before it sleeps, if it came so soon before
(``eventloop/busy_poll.py``), and if nothing is under way that would have to wait for it.

Used from one Trio loop; nothing here is thread-safe.
"""

from __future__ import annotations

import enum
import select
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from time import perf_counter_ns
from typing import Any

import outcome
import trio

from warabi.eventloop.busy_poll import Attention, Lookout
from warabi.eventloop.eager_start import continued

TURN = 250_000
"""Nanoseconds for which requests are served before other tasks get a turn."""
_LONG_TURN = 1_000_000
"""The same where nobody waits but those who come and go."""
_IDLE = 8
"""Workers that are kept for later."""


class Next(enum.Enum):
    """What becomes of a connection when something was done for it."""

    STAYS = enum.auto()  # until more comes
    MORE = enum.auto()  # has come already
    LEAVES = enum.auto()  # its own task goes on


STAYS, MORE, LEAVES = Next.STAYS, Next.MORE, Next.LEAVES

Serve = Callable[[], Coroutine[Any, Any, Next]]
"""Takes one request that has come, and answers it."""


class _Member:
    """A connection that stands in the crowd."""

    __slots__ = ("fd", "over", "queued", "scope", "serve", "task")

    def __init__(self, fd: int, serve: Serve) -> None:
        self.fd = fd
        self.serve = serve
        self.task = trio.lowlevel.current_task()
        self.queued = False  # something has come, which nobody has looked at
        self.scope: trio.CancelScope | None = None  # around what is being done for it
        self.over = False  # it is not to be served any more


class Crowd:
    """The connections of one loop, and those who serve them.

    Attributes:
        attention: which connection messages come from.
        lookout: whether they come soon.
        beside: requests under way beside others, which need turns of the loop to be answered.
    """

    def __init__(self) -> None:
        self.attention = Attention()
        self.lookout = Lookout()
        self.beside = 0
        self._epoll = select.epoll()
        self._poll = self._epoll.poll
        self._members: dict[int, _Member] = {}
        self._ready: deque[_Member] = deque()
        self._idle: list[trio.Event] = []
        self._nursery: trio.Nursery | None = None

    @asynccontextmanager
    async def served(self) -> AsyncIterator[None]:
        """While the block lasts; nobody may stand here at its end."""
        with self._epoll:
            async with trio.open_nursery() as self._nursery:
                self._lead_on()
                yield
                self._nursery.cancel_scope.cancel()

    async def stand(self, fd: int, serve: Serve) -> None:
        """Have *serve* called whenever something comes at *fd*, until that says that the
        caller is to go on, or has waited for anything.

        Raises:
            trio.ClosedResourceError: *fd* is being closed.
            Exception: whatever *serve* raises.
        """
        member = _Member(fd, serve)
        self._epoll.register(fd, select.EPOLLIN)
        self._members[fd] = member

        def abort(_: object) -> trio.lowlevel.Abort:
            if member.scope is None:
                self._remove(member)
                return trio.lowlevel.Abort.SUCCEEDED
            member.over = True
            member.scope.cancel()
            return trio.lowlevel.Abort.FAILED

        await trio.lowlevel.wait_task_rescheduled(abort)
        await trio.lowlevel.checkpoint_if_cancelled()

    def closing(self, fd: int) -> None:
        """To be called before *fd* is closed."""
        member = self._members.get(fd)
        if member is None:
            return
        self._remove(member)
        if member.scope is None:
            error = trio.ClosedResourceError("another task closed this connection")
            trio.lowlevel.reschedule(member.task, outcome.Error(error))

    def _remove(self, member: _Member) -> None:
        member.over = True
        if self._members.get(member.fd) is member:
            del self._members[member.fd]
            self._epoll.unregister(member.fd)

    # Workers

    def _lead_on(self) -> None:
        """Have another worker lead."""
        if self._idle:
            self._idle.pop().set()
        else:
            assert self._nursery is not None
            self._nursery.start_soon(self._work)

    async def _work(self) -> None:
        while True:
            leads = False
            with trio.CancelScope() as scope:
                leads = await self._lead(scope)
            if leads:
                continue
            if len(self._idle) >= _IDLE:
                return
            idle = trio.Event()
            self._idle.append(idle)
            await idle.wait()

    async def _lead(self, scope: trio.CancelScope) -> bool:
        """Serve until something waits, and see to its end, while another worker leads.

        True at once, for this one to lead on, where *scope* may have been cancelled.
        """
        now = turn = perf_counter_ns()
        ready = self._ready
        while True:
            for fd, _ in self._poll(0) or (not ready and self._look(now)) or ():
                member = self._members[fd]
                if not member.queued:
                    member.queued = True
                    ready.append(member)
            if not ready:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                self.lookout.came(now)
                now = turn = perf_counter_ns()
            for _ in range(len(ready)):
                member = ready.popleft()
                member.queued = False
                if member.over:
                    continue
                member.scope = scope
                work = member.serve()
                try:
                    step = work.send(None)
                except StopIteration as done:
                    self._settle(member, done.value)
                except Exception as error:
                    self._leave(member, outcome.Error(error))
                else:
                    await self._carry_on(member, work, step)
                    return False
                if member.over:
                    return True
                now = perf_counter_ns()
                if now - turn > (TURN if self.beside else _LONG_TURN):
                    await trio.lowlevel.checkpoint()
                    now = turn = perf_counter_ns()

    def _look(self, began: int) -> list[tuple[int, int]]:
        """What comes within a moment, if that is to be expected."""
        events: list[tuple[int, int]] = []
        if not self.beside:
            until = self.lookout.until(began)
            while not events and began < until:
                began = self.lookout.offer(began)
                events = self._poll(0)
        return events

    async def _carry_on(self, member: _Member, work: Coroutine[Any, Any, Next], step: Any) -> None:
        self._remove(member)
        self.beside += 1
        self._lead_on()
        end: outcome.Outcome[None] = outcome.Value(None)
        try:
            await continued(work, step)
        except Exception as error:
            end = outcome.Error(error)
        finally:
            self.beside -= 1
            self._leave(member, end)

    def _settle(self, member: _Member, what: Next) -> None:
        member.scope = None
        if member.over or what is LEAVES:
            self._leave(member, outcome.Value(None))
        elif what is MORE:
            member.queued = True
            self._ready.append(member)

    def _leave(self, member: _Member, end: outcome.Outcome[None]) -> None:
        self._remove(member)
        trio.lowlevel.reschedule(member.task, end)
