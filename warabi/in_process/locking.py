"""Locks on files for the clients in a Trio loop: what has to wait is a task."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import trio

from warabi.protocol import operations
from warabi.protocol.operations import Served
from warabi.target.file_locks import FileLocks, LockClient, WaitingLock
from warabi.target.target import Target

OPERATIONS = frozenset(
    name for name, operation in operations.OPERATIONS.items() if operation.served is Served.LOCKS
)


class Granting:
    """A request for a lock that may have to wait."""

    def __init__(self, locks: FileLocks, client: LockClient, arguments: Sequence[Any]) -> None:
        self._locks = locks
        self._token = trio.lowlevel.current_trio_token()
        self._woken = trio.Event()
        self._waiting: WaitingLock | None = locks.request(client, *arguments, wake=self._wake)

    @property
    def waits(self) -> bool:
        """Whether it has to wait; else it is granted."""
        return self._waiting is not None

    def _wake(self) -> None:
        # In the same thread, too: a loop that waits for requests looks for such calls.
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._set)

    def _set(self) -> None:
        self._woken.set()

    async def wait(self) -> None:
        """Wait until it is over; raises the error with which it ended.

        A cancelled wait leaves the request pending, for ``FileLocks.cancel``.
        """
        waiting = self._waiting
        while waiting is not None and not waiting.done:
            await self._woken.wait()
            self._woken = trio.Event()
            if not waiting.done:
                await trio.lowlevel.checkpoint()
                self._locks.settle()
        if waiting is not None and waiting.error is not None:
            raise waiting.error


async def execute(locks: FileLocks, client: LockClient, name: str, arguments: Sequence[Any]) -> Any:
    """Execute an operation on locks for *client*; returns its result."""
    if name == "lock" and arguments[-1]:
        return await Granting(locks, client, arguments).wait()
    return locks.execute(client, name, arguments)


class SessionLocks:
    """The locks of one connection, on the targets that it uses."""

    def __init__(self) -> None:
        self._clients: WeakKeyDictionary[Target, LockClient] = WeakKeyDictionary()

    def begin(self, target: Target, name: str, arguments: Sequence[Any]) -> Any:
        """Execute an operation on locks; returns its result, or a :class:`Granting` that waits."""
        locks = target.file_locks
        client = self._clients.get(target)
        if name == "lock_session":
            if client is not None and client.token == arguments[0]:
                return None
            if client is not None:
                locks.end(client, self)
            self._clients[target] = locks.client(self, *arguments)
            return None
        if client is None:
            client = self._clients[target] = locks.client(self)
        if name != "lock" or not arguments[-1]:
            return locks.execute(client, name, arguments)
        granting = Granting(locks, client, arguments)
        return granting if granting.waits else None

    def end(self) -> None:
        """The connection has ended: what waits fails, and other clients may lock."""
        for target, client in self._clients.items():
            target.file_locks.end(client, self)
        self._clients.clear()
