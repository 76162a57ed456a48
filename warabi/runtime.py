"""The Trio loop of a serving engine, in a thread of its own."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
from collections.abc import Callable

import trio

from warabi import address, errors
from warabi.address import Endpoint
from warabi.provider import ProviderCore
from warabi.session import Session

log = logging.getLogger(__name__)

_MAX_CONNECTIONS = 1024
_DRAIN_PATIENCE = 2.0
"""Seconds that peers have, at the end, to send the rest of a request and to take their replies."""


class Runtime:
    """Listens at an endpoint and serves providers until stopped.

    Args:
        wanted: where to listen; parts may be left out.
        insecure: whether it may be reachable from other hosts.
        on_shutdown: called, from the loop, when a peer asks the engine to shut down.

    Raises:
        ConfigError, PermissionDenied: it cannot listen there.
    """

    def __init__(self, wanted: Endpoint, insecure: bool, on_shutdown: Callable[[], None]) -> None:
        self._listener, self.endpoint = address.listen(wanted, insecure=insecure)
        self.providers: dict[int, ProviderCore] = {}
        self.remote_shutdown = False
        self._on_shutdown = on_shutdown
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._accepting = trio.CancelScope()
        self._sessions: set[Session] = set()
        self._started = threading.Event()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="warabi-engine", daemon=True)
        self._thread.start()
        self._started.wait()

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException:
            log.exception("the engine's loop ended with an error")
        finally:
            self._started.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        listener = trio.socket.from_stdlib_socket(self._listener)
        with self._scope:
            async with trio.open_nursery() as nursery:
                with listener, self._accepting:
                    self._started.set()
                    await self._accept(listener, nursery)

    async def _accept(self, listener: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        while True:
            try:
                connection, _ = await listener.accept()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    log.debug("accept: %s", error)
                    continue
                log.error("accept: %s; no new connections for a moment", error.strerror)
                await trio.sleep(0.1)
                continue
            if len(nursery.child_tasks) >= _MAX_CONNECTIONS:
                log.error("connection refused: %d are open already", _MAX_CONNECTIONS)
                connection.close()
                continue
            if self.endpoint.local:
                uid = address.peer_uid(connection)  # type: ignore[arg-type]  # has getsockopt
                if uid not in (os.getuid(), 0):
                    log.error("connection refused: from another user, %d", uid)
                    connection.close()
                    continue
            else:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            nursery.start_soon(self._serve, connection)

    async def _serve(self, connection: trio.socket.SocketType) -> None:
        session = Session(connection, self.find, self._shutdown)
        self._sessions.add(session)
        if self._accepting.cancel_called:
            session.drain()
        try:
            await session.run()
        except Exception:
            log.exception("a defect ended a connection")
        finally:
            self._sessions.discard(session)

    def _drain(self) -> None:
        """Take nothing new, and end when what has come in is answered."""
        self._accepting.cancel()
        self._scope.deadline = trio.current_time() + _DRAIN_PATIENCE
        for session in list(self._sessions):
            session.drain()

    def find(self, provider_id: int) -> ProviderCore:
        """The provider with that ID.

        Raises:
            ProviderNotFound: there is none.
        """
        try:
            return self.providers[provider_id]
        except KeyError:
            raise errors.ProviderNotFound(f"no provider {provider_id} at {self.endpoint}") from None

    def _shutdown(self) -> None:
        if not self.remote_shutdown:
            raise errors.PermissionDenied(f"{self.endpoint}: remote shutdown is not enabled")
        self._on_shutdown()

    def stop(self) -> None:
        """Answer what has come in, end the loop and close every provider.

        Idempotent; not from the loop itself.
        """
        if os.getpid() != self._pid:
            return  # a forked child holds copies of things that are its parent's
        if self._token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._drain)
        self._thread.join()
        self._listener.close()
        if self.endpoint.local:
            address.local_path(self.endpoint).unlink(missing_ok=True)
        failures = []
        for core in list(self.providers.values()):
            try:
                core.close()
            except errors.Exception as error:
                failures.append(error)
        self.providers.clear()
        if failures:
            raise failures[0]
