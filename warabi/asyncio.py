"""The client for asyncio programs and Jupyter: the API of ``warabi.client`` as coroutines.

    async with warabi.asyncio.connect(address, provider_id) as target:
        region = await target.create_and_write(b"...")

The connection belongs to a Trio loop in a thread of its own, so that nothing but the checks of
arguments runs in the caller's loop.  Many calls of one connection can be under way at the same
time, from one asyncio loop or several.  Cancellation is that of ``warabi.aio``: a cancelled call
has taken effect or not, and its buffers are not accessed after it has ended.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import outcome
import trio

from warabi import aio, errors
from warabi._core.attributes import Attributes
from warabi._core.changes import Changes
from warabi._core.extents import Extent
from warabi._core.results import RegionStat
from warabi._core.tuning import CONNECT_TIMEOUT, SILENCE_TIMEOUT
from warabi.in_process.aio_link import AsyncLink, GetBuffer
from warabi.protocol.operations import UNDONE, undo
from warabi.region import RegionID

_Value = TypeVar("_Value")


class _TrioThread:
    """A thread with a Trio loop, in which *main* runs until it returns.

    Attributes:
        started: is done when :meth:`call` and :meth:`soon` can be called.
        ended: the outcome of *main*, when the thread has ended.
    """

    def __init__(self, main: Callable[[], Awaitable[None]]) -> None:
        self._main = main
        self._nursery: trio.Nursery
        self._token: trio.lowlevel.TrioToken
        self._loop = asyncio.get_running_loop()
        self.started: asyncio.Future[None] = self._loop.create_future()
        self.ended: asyncio.Future[outcome.Outcome[None]] = self._loop.create_future()
        self._thread = threading.Thread(target=self._work, name="warabi-asyncio", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        result = outcome.capture(trio.run, self._run)
        _complete(self._loop, self.ended, result)

    async def _run(self) -> None:
        failure: Exception | None = None
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self._nursery:
            _complete(self._loop, self.started, None)
            try:
                await self._main()
            except Exception as error:  # a nursery would wrap it in a group
                failure = error
            self._nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def join(self) -> outcome.Outcome[None]:
        """Return the outcome of *main* when the thread has ended."""
        ended = await asyncio.shield(self.ended)
        self._thread.join()  # its last action was to set that
        return ended

    def cancel(self) -> None:
        """Cancel *main*."""
        self.soon(lambda: self._nursery.cancel_scope.cancel())

    def soon(self, function: Callable[[], object]) -> None:
        """Call *function* in the Trio loop; does nothing if that has ended."""
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(function)

    async def call(
        self,
        function: Callable[..., Awaitable[_Value]],
        *arguments: Any,
        undo: Callable[[_Value], Awaitable[object]] | None = None,
    ) -> _Value:
        """Return the result of a coroutine function that runs in the Trio loop.

        When the caller is cancelled, *function* is too, and has ended when this raises.  A result
        that it returned nevertheless is given to *undo*.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[outcome.Outcome[_Value]] = loop.create_future()
        scope = trio.CancelScope()

        async def run() -> None:
            result: outcome.Outcome[_Value] = outcome.Error(_ended())
            try:
                with scope:
                    result = outcome.Value(await function(*arguments))
            except Exception as error:
                result = outcome.Error(error)
            finally:
                _complete(loop, future, result)

        def start() -> None:
            try:
                self._nursery.start_soon(run)
            except RuntimeError:  # it has ended
                _complete(loop, future, outcome.Error(_ended()))

        try:
            self._token.run_sync_soon(start)
        except trio.RunFinishedError:
            raise _ended() from None
        cancelled: asyncio.CancelledError | None = None
        while not future.done():
            try:
                await asyncio.shield(future)
            except asyncio.CancelledError as error:
                cancelled = error
                self.soon(scope.cancel)
        result = future.result()
        if cancelled is not None:
            if undo is not None and isinstance(result, outcome.Value):
                self._undo(undo, result.value)
            raise cancelled
        return result.unwrap()

    def _undo(self, undo: Callable[[_Value], Awaitable[object]], value: _Value) -> None:
        async def run() -> None:
            with trio.move_on_after(CONNECT_TIMEOUT, shield=True), suppress(errors.Exception):
                await undo(value)

        def start() -> None:
            with suppress(RuntimeError):  # it has ended
                self._nursery.start_soon(run)

        self.soon(start)


def _ended() -> errors.ConnectionLost:
    return errors.ConnectionLost("the connection has been closed")


def _complete(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[_Value], result: _Value
) -> None:
    """Set a future's result, from any thread."""
    with suppress(RuntimeError):  # the loop has been closed
        loop.call_soon_threadsafe(future.set_result, result)


class _BridgedLink:
    """A link whose calls are executed by another one in a Trio thread."""

    def __init__(self, thread: _TrioThread, link: AsyncLink) -> None:
        self._thread = thread
        self._link = link

    async def _undo(self, name: str, arguments: Sequence[Any], result: Any) -> None:
        undoing = undo(name, arguments, result)
        if undoing is not None:
            await self._link.call(*undoing)

    async def call(self, name: str, arguments: Sequence[Any]) -> Any:
        undoing = partial(self._undo, name, arguments) if name in UNDONE else None
        return await self._thread.call(self._link.call, name, arguments, undo=undoing)

    async def changes(self, number: int, new_names: bool) -> Changes:
        return await self._thread.call(self._link.changes, number, new_names)

    async def size(self, region: RegionID) -> int:
        return await self._thread.call(self._link.size, region)

    async def write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool, extend: bool
    ) -> None:
        await self._thread.call(self._link.write, region, offset, data, persist, extend)

    async def read_into(self, region: RegionID, offset: int, place: memoryview) -> None:
        await self._thread.call(self._link.read_into, region, offset, place)

    async def read_some(self, region: RegionID, offset: int, size: int, place: GetBuffer) -> int:
        return await self._thread.call(self._link.read_some, region, offset, size, place)

    async def create_and_write(self, data: memoryview, persist: bool) -> RegionID:
        create = self._link.create_and_write
        undoing = partial(self._undo, "create_and_write", (persist,))
        return await self._thread.call(create, data, persist, undo=undoing)

    async def store(self, arguments: Sequence[Any], data: memoryview) -> Attributes | None:
        return await self._thread.call(self._link.store, arguments, data)

    async def write_vector(
        self, region: RegionID, extents: list[Extent], data: memoryview, persist: bool
    ) -> None:
        await self._thread.call(self._link.write_vector, region, extents, data, persist)

    async def append(self, region: RegionID, data: memoryview, persist: bool) -> int:
        return await self._thread.call(self._link.append, region, data, persist)

    async def read_vector(self, region: RegionID, extents: list[Extent], place: memoryview) -> None:
        await self._thread.call(self._link.read_vector, region, extents, place)


class Target(aio.Target):
    """A target with the methods, arguments, results and errors of
    :class:`warabi.client.TargetHandle`; every method is a coroutine for asyncio."""

    async def _clean_up(self, undo: Coroutine[Any, Any, None]) -> None:
        with suppress(errors.Exception, TimeoutError):
            await asyncio.wait_for(asyncio.shield(undo), CONNECT_TIMEOUT)


@asynccontextmanager
async def connect(
    address: str,
    provider_id: int = 0,
    *,
    timeout: float = SILENCE_TIMEOUT,
    deadline: float | None = None,
    share: bool = True,
    read_only: bool = False,
    tls: dict[str, Any] | None = None,
    token: str | None = None,
    token_file: str | os.PathLike[str] | None = None,
) -> AsyncIterator[Target]:
    """Connect to a target of the engine at *address*, for the duration of the block.

    Arguments and errors are those of :func:`warabi.aio.connect`.
    """
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[AsyncLink] = loop.create_future()
    closing = trio.Event()

    async def main() -> None:
        async with aio.connect(
            address, provider_id, timeout=timeout, deadline=deadline, share=share,
            read_only=read_only, tls=tls, token=token, token_file=token_file,
        ) as target:  # fmt: skip
            _complete(loop, opened, target.link)
            await closing.wait()

    thread = _TrioThread(main)
    try:
        await asyncio.shield(thread.started)
        first: list[asyncio.Future[Any]] = [opened, thread.ended]
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if opened.done():
            place = f"{str(address)!r}, {provider_id}{', read_only=True' if read_only else ''}"
            yield Target(_BridgedLink(thread, opened.result()), place)
    finally:
        await asyncio.shield(thread.started)
        if opened.done():
            thread.soon(closing.set)
        else:
            thread.cancel()
        ended = await thread.join()
    ended.unwrap()


__all__ = ["RegionID", "RegionStat", "Target", "connect"]
