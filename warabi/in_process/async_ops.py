"""Executing operations of a target in a Trio task without blocking its loop.

Operations on memory or the page cache are executed directly; those that have to wait for stable
storage use a worker thread, or without *wait* raise ``WouldBlock``, without effect.  Used by the
provider and by Trio programs that own a target.  A call in a thread is completed even if the task
is cancelled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import trio

from warabi import errors
from warabi._core.attributes import Attributes
from warabi._core.buffers import readable
from warabi._core.extents import Extent
from warabi._core.log_limit import RateLimit
from warabi.errors import WouldBlock
from warabi.eventloop.threads import in_thread
from warabi.in_process.occupancy import wait_free
from warabi.protocol.operations import OPERATIONS
from warabi.region import RegionID
from warabi.target import named_files
from warabi.target.handlers import CALLS
from warabi.target.state import in_loop
from warabi.target.target import Target

log = logging.getLogger(__name__)
log.addFilter(RateLimit())

_T = TypeVar("_T")


_limiters: trio.lowlevel.RunVar[WeakKeyDictionary[Target, trio.CapacityLimiter]]
_limiters = trio.lowlevel.RunVar("warabi-limiters")


def _limiter(target: Target) -> trio.CapacityLimiter:
    """Return the limiter of calls that wait for stable storage, as configured for the target."""
    if target.threads is None:
        return trio.to_thread.current_default_thread_limiter()
    try:
        limiters = _limiters.get()
    except LookupError:
        limiters = WeakKeyDictionary()
        _limiters.set(limiters)
    return limiters.setdefault(target, trio.CapacityLimiter(target.threads))


async def _in_thread(target: Target, call: Callable[..., _T], *arguments: Any) -> _T:
    """Run *call* in a worker thread, concurrently with others as the limiter allows."""
    return await in_thread(partial(call, *arguments), _limiter(target))


def needs_thread(target: Target, name: str) -> bool:
    """Whether the operation *name* always needs a worker thread."""
    operation = OPERATIONS[name]
    return operation.long or (operation.waits and target.blocking)


def off_loop(target: Target, name: str) -> bool:
    """Whether the operation *name* needs a worker thread now."""
    return target.occupied or needs_thread(target, name)


async def _when_free(target: Target, wait: bool) -> None:
    """Wait while the target's lock is held for long; raise ``WouldBlock`` without *wait*."""
    if not wait:
        raise WouldBlock
    await wait_free(target)


async def execute(
    target: Target, name: str, arguments: list[Any] | tuple[Any, ...], *, wait: bool = True
) -> Any:
    """Execute the operation *name* on *target*; returns its result.

    Without *wait*, ``WouldBlock`` is raised if it would have to wait for another call, or takes
    long with these arguments.
    """
    call = CALLS[name]
    if target.occupied:
        await _when_free(target, wait)
    if not needs_thread(target, name):
        try:
            return in_loop(call, target, *arguments)
        except WouldBlock:
            if not wait:
                raise
        return await _in_thread(target, call, target, *arguments)
    return await _in_thread(target, call, target, *arguments)


def waits(target: Target, name: str, arguments: Sequence[Any]) -> bool:
    """Whether the upload *name* is known to wait for stable storage."""
    operation = OPERATIONS[name]
    if target.occupied:
        return True
    if operation.waits:
        return target.blocking
    persist = bool(arguments[operation.position["persist"]])
    return target.write_waits or (target.blocking and persist)


async def write(
    target: Target, region: RegionID, offset: int, data: Any, persist: bool, extend: bool,
    *, wait: bool = True,
) -> None:  # fmt: skip
    """See ``Target.write``."""
    if target.occupied:
        await _when_free(target, wait)
    try:
        in_loop(target.write, region, offset, data, extend=extend, wait=not target.blocking)
    except WouldBlock:
        if not wait:
            raise
        await _in_thread(target, lambda: target.write(region, offset, data, extend=extend))
    if persist:
        await execute(target, "persist", (region, offset, len(readable(data, "write: data"))))


async def append(
    target: Target, region: RegionID, data: Any, persist: bool, *, wait: bool = True
) -> int:
    """See ``Target.append``."""
    if target.occupied:
        await _when_free(target, wait)
    try:
        offset = in_loop(target.append, region, data, wait=not target.blocking)
    except WouldBlock:
        if not wait:
            raise
        offset = await _in_thread(target, target.append, region, data)
    if persist:
        size = len(readable(data, "append: data"))
        await execute(target, "persist", (region, offset, size))
    return offset


async def read_into(
    target: Target, region: RegionID, offset: int, buffer: Any,
    *, short: bool = False, wait: bool = True,
) -> int:  # fmt: skip
    """See ``Target.read_into``."""
    if target.occupied:
        await _when_free(target, wait)
    try:
        may_wait = not target.blocking
        return in_loop(target.read_into, region, offset, buffer, short=short, wait=may_wait)
    except WouldBlock:
        if not wait:
            raise
        return await _in_thread(
            target, lambda: target.read_into(region, offset, buffer, short=short)
        )


async def write_vector(target: Target, region: RegionID, extents: list[Extent], data: Any) -> None:
    """See ``Target.write_vector``."""
    if target.occupied:
        await wait_free(target)
    if not target.blocking:
        with suppress(WouldBlock):
            in_loop(target.write_vector, region, extents, data)
            return
    await _in_thread(target, target.write_vector, region, extents, data)


async def read_vector(
    target: Target, region: RegionID, extents: list[Extent], place: memoryview,
    *, wait: bool = True,
) -> None:  # fmt: skip
    """See ``Target.read_vector``."""
    if target.occupied:
        await _when_free(target, wait)
    if not target.blocking:
        with suppress(WouldBlock):
            in_loop(target.read_vector, region, extents, place)
            return
    if not wait:
        raise WouldBlock
    await _in_thread(target, target.read_vector, region, extents, place)


async def create_and_write(target: Target, data: Any, persist: bool) -> RegionID:
    """See ``Target.create_and_write``."""
    if target.occupied:
        await wait_free(target)
    if waits(target, "create_and_write", (persist,)):
        return await _in_thread(target, target.create_and_write, data, persist)
    return in_loop(target.create_and_write, data, persist)


async def store(target: Target, arguments: Sequence[Any], data: Any) -> Attributes:
    """See ``named_files.store``."""
    if target.occupied:
        await wait_free(target)
    if not waits(target, "store", arguments):
        with suppress(WouldBlock):  # a long path
            return in_loop(named_files.store, target, *arguments, data)
    return await _in_thread(target, named_files.store, target, *arguments, data)


def failure(error: Exception, name: str) -> errors.Exception:
    """Convert an exception of operation *name* to one for the client; logs unhandled exceptions."""
    if isinstance(error, errors.Exception):
        return error
    if isinstance(error, OSError):
        return errors.from_os(error, name)
    log.error("unhandled exception in operation %s", name, exc_info=error)
    return errors.ProviderFailed(f"{name}: {type(error).__name__} in the provider, see its log")
