"""The Trio loop of a serving engine, in a separate thread."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import trio

from warabi import errors
from warabi._core import forks
from warabi._core.counters import Totals
from warabi._core.log_limit import RateLimit
from warabi._core.tuning import ACCEPT_PAUSE, DRAIN_PATIENCE
from warabi.eventloop import loop_watchdog
from warabi.protocol import address
from warabi.protocol.address import Endpoint
from warabi.protocol.auth import Security
from warabi.protocol.limits import EngineLimits
from warabi.provider.admission import Admission, PeerConnection
from warabi.provider.core import ProviderCore
from warabi.provider.direct_access import GuestConnection
from warabi.provider.idle_connections import IdleConnections
from warabi.provider.report import MOST_CLIENTS, process_report, provider_report
from warabi.provider.session import ClientSession
from warabi.shm.liveness import LifeSigns
from warabi.target.state import LOOPS

log = logging.getLogger(__name__)
log.addFilter(RateLimit())  # most messages are caused by peers


_KEPT_ALIVE = (
    # Close connections to dead hosts within minutes, and release what they hold.
    ((socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 60),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPINTVL), 15),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPCNT), 4),
)


class ProviderLoop:
    """Listens at an endpoint and serves providers until stopped.

    Args:
        wanted: where to listen; parts may be omitted.
        security: requirements on peers.
        limits: limits on peers.
        on_shutdown: called, from the loop, when a peer requests a shutdown of the engine.
        share: whether processes of this host may have direct access.

    Raises:
        ConfigError, PermissionDenied: it cannot listen there.
    """

    def __init__(
        self,
        wanted: Endpoint,
        security: Security,
        limits: EngineLimits,
        on_shutdown: Callable[[], None],
        *,
        share: bool,
    ) -> None:
        if security.tls is not None:
            assert security.tls.server  # report problems with the files now
        self._share = share
        self._life = LifeSigns()
        self._listener, self.endpoint = address.listen(wanted, protected=security.protected)
        self._security = security
        self._limits = limits
        self._admission = Admission(limits)
        self._idle_connections = IdleConnections()
        self.providers: dict[int, ProviderCore] = {}
        self.remote_shutdown = False
        self._on_shutdown = on_shutdown
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._accepting = trio.CancelScope()
        self._sessions: set[ClientSession] = set()
        self._accepted = 0  # connections so far
        self._started = forks.event()
        self.pid = os.getpid()
        forks.register(self)
        self._thread = threading.Thread(target=self._run, name="warabi-engine", daemon=True)
        self._thread.start()
        self._started.wait()

    def _forked(self) -> None:
        # Peers must see their connections and the listener close when the parent exits.
        self.providers = {}
        forks.disconnect(fd for fd in (s.fileno() for s in self._sessions) if fd >= 0)
        if self._listener.fileno() >= 0:
            forks.disconnect([self._listener.fileno()])

    def _run(self) -> None:
        LOOPS.add(threading.get_ident())
        try:
            trio.run(self._main, instruments=loop_watchdog.instruments())
        except BaseException:
            log.exception("the engine's loop ended with an error")
        finally:
            LOOPS.discard(threading.get_ident())
            self._life.close()
            self._started.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with self._scope:
            async with self._idle_connections.served(), trio.open_nursery() as nursery:
                with self._listener, self._accepting:
                    self._started.set()
                    await self._accept(nursery)

    async def _accept(self, nursery: trio.Nursery) -> None:
        while True:
            try:
                await trio.lowlevel.wait_readable(self._listener)
                connection, where = self._listener.accept()
            except BlockingIOError:  # the peer has given up
                continue
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    log.debug("accept: %s", error)
                    continue
                log.error("accept: %s; pausing before accepting more connections", error.strerror)
                await trio.sleep(ACCEPT_PAUSE)
                continue
            connection.setblocking(False)
            pid = 0
            if self.endpoint.local:
                pid, uid = address.peer(connection)
                if uid not in (os.getuid(), 0):
                    log.error("connection refused: the peer's user ID is %d", uid)
                    connection.close()
                    continue
            else:
                address.prepare(connection)
                for option, value in _KEPT_ALIVE:
                    connection.setsockopt(*option, value)
            self._accepted += 1
            where_from = "" if self.endpoint.local else str(where[0])
            name = f"process {pid}" if self.endpoint.local else f"{where[0]} port {where[1]}"
            self._receive(connection, where_from, pid, name, nursery)

    def _receive(
        self, connection: socket.socket, host: str, pid: int, name: str, nursery: trio.Nursery
    ) -> None:
        session = ClientSession(
            connection,
            self.find,
            self._shutdown,
            security=self._security,
            limits=self._limits,
            local=self.endpoint.local,
            admit=lambda: self._admission.admit(peer),
            leave=lambda: self._admission.leave(peer),
            host=GuestConnection(self._life, pid) if self.endpoint.local and self._share else None,
            idle_connections=self._idle_connections,
            name=name,
            report=lambda provider_id: self.report([self.find(provider_id)]),
        )
        peer = PeerConnection(host, session.drop)
        self._admission.arrive(peer)
        self._sessions.add(session)
        nursery.start_soon(self._serve, session)

    async def _serve(self, session: ClientSession) -> None:
        if self._accepting.cancel_called:
            session.drain()
        try:
            await session.run()
        except Exception:
            log.exception("unhandled exception in a connection; closing it")
        finally:
            self._sessions.discard(session)

    def _drain(self) -> None:
        """Accept no new requests, and end when pending ones are completed."""
        self._accepting.cancel()
        self._scope.deadline = trio.current_time() + DRAIN_PATIENCE
        for session in list(self._sessions):
            session.drain()

    def find(self, provider_id: int) -> ProviderCore:
        """Return the provider with that ID.

        Raises:
            ProviderNotFound: there is none.
        """
        try:
            return self.providers[provider_id]
        except KeyError:
            raise errors.ProviderNotFound(f"no provider {provider_id} at {self.endpoint}") from None

    def totals(self) -> list[Totals]:
        """Return what was counted, of each provider.  From any thread."""
        return [core.counters.totals() for core in self.providers.copy().values()]

    @property
    def security(self) -> Security:
        """What is required of peers."""
        return self._security

    @property
    def token(self) -> trio.lowlevel.TrioToken:
        """By which other threads reach the loop."""
        assert self._token is not None  # it has started
        return self._token

    def report(self, cores: Sequence[ProviderCore] | None = None) -> dict[str, Any]:
        """Return the state of the engine, and of some of its providers or all, as JSON can have
        it (``report.py``).  From any thread but the loop's, which it would hold."""
        clients = [session.describe() for session in self._sessions.copy()]
        shown = list(self.providers.copy().values()) if cores is None else cores
        return {
            "kind": "engine",
            "address": str(self.endpoint),
            **process_report(),
            "provider_ids": sorted(self.providers.copy()),
            "connections": {"open": len(clients), "accepted": self._accepted},
            "clients": sorted(clients, key=lambda client: client["since"])[:MOST_CLIENTS],
            "targets": [provider_report(core) for core in shown],
        }

    def _shutdown(self) -> None:
        if not self.remote_shutdown:
            raise errors.PermissionDenied(f"{self.endpoint}: remote shutdown is not enabled")
        self._on_shutdown()

    def stop(self) -> None:
        """Complete pending requests, stop the loop and close every provider.

        Idempotent; must not be called from the loop itself.
        """
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
