"""Idle connections: connections without pending requests share one epoll(7) and one task.

A turn of Trio's loop for each request of each connection would cost as much as the request.  So
connections whose own tasks have nothing to do wait here, and one task, the *leader*, serves those
that become readable, one request of each in turn.  Most requests complete without blocking.  If one
blocks, the task that started it continues it, another task becomes the leader, and afterwards the
connection's own task resumes.

The connection's own task is suspended until a request that was started for it has ended, so two
tasks never serve one connection.  Cancelling it cancels the request.

If nothing is readable, the leader polls for a moment before it blocks, if messages arrived soon
before (``eventloop/busy_poll.py``), and no pending request would be delayed.

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

from warabi._core.tuning import IDLE_TURN, QUIET_TURN
from warabi.eventloop.busy_poll import Attention, BusyPoll
from warabi.eventloop.eager_start import continued

_IDLE = 8
"""Idle worker tasks that are kept."""


class Next(enum.Enum):
    """What happens to a connection after a request."""

    STAYS = enum.auto()  # wait for more input
    MORE = enum.auto()  # more input has arrived
    LEAVES = enum.auto()  # its own task resumes


STAYS, MORE, LEAVES = Next.STAYS, Next.MORE, Next.LEAVES

Serve = Callable[[], Coroutine[Any, Any, Next]]
"""Serves one request that has arrived."""


class _Member:
    """An idle connection."""

    __slots__ = ("fd", "over", "queued", "scope", "serve", "task")

    def __init__(self, fd: int, serve: Serve) -> None:
        self.fd = fd
        self.serve = serve
        self.task = trio.lowlevel.current_task()
        self.queued = False  # readable, but not served yet
        self.scope: trio.CancelScope | None = None  # of the request being served for it
        self.over = False  # it must not be served any more


class IdleConnections:
    """The idle connections of one loop, and the tasks that serve them.

    Attributes:
        attention: tracks from which connection messages arrive.
        busy_poll: polling state.
        concurrent: number of requests running concurrently, which need turns of the loop to
            complete.
    """

    def __init__(self) -> None:
        self.attention = Attention()
        self.busy_poll = BusyPoll()
        self.concurrent = 0
        self._epoll = select.epoll()
        self._poll = self._epoll.poll
        self._members: dict[int, _Member] = {}
        self._ready: deque[_Member] = deque()
        self._idle: list[trio.Event] = []
        self._nursery: trio.Nursery | None = None

    @asynccontextmanager
    async def served(self) -> AsyncIterator[None]:
        """Serve for the duration of the block; no connection may be idle at its end."""
        with self._epoll:
            async with trio.open_nursery() as self._nursery:
                self._lead_on()
                yield
                self._nursery.cancel_scope.cancel()

    async def wait_to_serve(self, fd: int, serve: Serve) -> None:
        """Call *serve* whenever *fd* is readable, until it returns that the caller should resume,
        or has blocked.

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
        """Must be called before *fd* is closed."""
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
        """Make another worker the leader."""
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
        """Serve until a request blocks, and complete that while another worker leads.

        Returns True at once, so that this worker continues to lead, if *scope* may have been
        cancelled.
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
                self.busy_poll.came(now)
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
                    self._end_turn(member, done.value)
                except Exception as error:
                    self._leave(member, outcome.Error(error))
                else:
                    await self._carry_on(member, work, step)
                    return False
                if member.over:
                    return True
                now = perf_counter_ns()
                if now - turn > (IDLE_TURN if self.concurrent else QUIET_TURN):
                    await trio.lowlevel.checkpoint()
                    now = turn = perf_counter_ns()

    def _look(self, began: int) -> list[tuple[int, int]]:
        """Poll for a moment if input is expected."""
        events: list[tuple[int, int]] = []
        if not self.concurrent:
            until = self.busy_poll.until(began)
            while not events and began < until:
                began = self.busy_poll.offer(began)
                events = self._poll(0)
        return events

    async def _carry_on(self, member: _Member, work: Coroutine[Any, Any, Next], step: Any) -> None:
        self._remove(member)
        self.concurrent += 1
        self._lead_on()
        end: outcome.Outcome[None] = outcome.Value(None)
        try:
            await continued(work, step)
        except Exception as error:
            end = outcome.Error(error)
        finally:
            self.concurrent -= 1
            self._leave(member, end)

    def _end_turn(self, member: _Member, what: Next) -> None:
        member.scope = None
        if member.over or what is LEAVES:
            self._leave(member, outcome.Value(None))
        elif what is MORE:
            member.queued = True
            self._ready.append(member)

    def _leave(self, member: _Member, end: outcome.Outcome[None]) -> None:
        self._remove(member)
        trio.lowlevel.reschedule(member.task, end)
