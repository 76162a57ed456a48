"""Calls in worker threads for Trio programs."""

from __future__ import annotations

import contextlib
import os
import threading
from contextvars import ContextVar

import pytest
import trio
import trio.testing

from warabi.eventloop.threads import in_thread


async def test_results_and_errors_come_back() -> None:
    assert await in_thread(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 // 0)
    assert await in_thread(lambda: "again") == "again"


async def test_context_variables_are_the_task_s() -> None:
    variable: ContextVar[str] = ContextVar("variable")
    variable.set("mine")
    assert await in_thread(variable.get) == "mine"
    await in_thread(lambda: variable.set("its own"))
    assert variable.get() == "mine"


async def test_many_run_side_by_side_up_to_the_limit() -> None:
    limiter = trio.CapacityLimiter(3)
    lock = threading.Lock()
    running = most = done = 0
    three = threading.Barrier(3)

    def call() -> None:
        nonlocal running, most, done
        with lock:
            running += 1
            most = max(most, running)
        three.wait()
        with lock:
            running -= 1
            done += 1

    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(in_thread, call, limiter)
    assert (most, done, limiter.borrowed_tokens) == (3, 30, 0)


async def test_a_call_that_was_begun_is_waited_for() -> None:
    """Also when the task is cancelled, and nothing else waits meanwhile."""
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()

    def call() -> str:
        begun.set()
        go.wait()
        ended.set()
        return "done"

    result = ""

    async def wait() -> None:
        nonlocal result
        result = await in_thread(call)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        begun.wait()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.testing.wait_all_tasks_blocked()
            assert result == ""
            go.set()
    assert ended.is_set()
    assert result == "done"


async def test_a_call_cancelled_before_its_start_does_nothing() -> None:
    begun = threading.Event()
    limiter = trio.CapacityLimiter(1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await in_thread(begun.set)
    assert scope.cancelled_caught
    limiter.acquire_nowait()
    with trio.move_on_after(0.01) as scope:
        await in_thread(begun.set, limiter)
    assert scope.cancelled_caught
    assert not begun.is_set()


def test_nothing_is_left_behind() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(in_thread, lambda: None)

    for _ in range(3):
        trio.run(main)


def _signals() -> int:
    """Descriptors of this process by which tasks can be woken."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            count += os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"
    return count


async def test_descriptors_of_a_busy_moment_are_given_back() -> None:
    before, together = _signals(), threading.Barrier(50)
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(in_thread, together.wait, trio.CapacityLimiter(50))
    assert _signals() - before <= 16
    assert await in_thread(lambda: "again") == "again"
