"""Engines: a process's network endpoint, which serves providers or only connects to others.

A serving engine runs a Trio loop in a background thread (``provider/loop.py``); a client's engine
has no thread, its calls do their own I/O.  Neither keeps the interpreter from exiting: an engine is
finalized when it is garbage-collected, or at interpreter exit.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import enum
import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from warabi import errors, processes
from warabi._core import extras, forks, interrupts
from warabi.protocol import address, engine_settings
from warabi.protocol.address import Endpoint
from warabi.protocol.auth import Security
from warabi.protocol.engine_settings import EngineSettings
from warabi.protocol.pending import Patience
from warabi.remote.connection import BlockingConnection
from warabi.remote.direct import DirectAccessChannel
from warabi.service import ShutdownSignals

if TYPE_CHECKING:
    from warabi.provider.loop import ProviderLoop


class Mode(enum.Enum):
    """Whether an engine serves, or only connects to others."""

    CLIENT = "client"
    SERVER = "server"


client = Mode.CLIENT
server = Mode.SERVER


_TRACE = 5
logging.addLevelName(_TRACE, "TRACE")


class EngineLogger(logging.LoggerAdapter[logging.Logger]):
    """The logger ``warabi``, with the calls of Margo's loggers, too."""

    def trace(self, message: object, *arguments: object) -> None:
        """Log at level 5, below ``DEBUG``."""
        self.log(_TRACE, message, *arguments)

    def set_log_level(self, level: int | str | enum.Enum) -> None:
        """Log what is at least of this level: one of :mod:`logging`, or its name in any case.

        Raises:
            ConfigError: it is not a level.
        """
        name = level.name if isinstance(level, enum.Enum) else level
        try:
            self.setLevel(name.upper() if isinstance(name, str) else name)
        except (TypeError, ValueError):
            raise errors.ConfigError(
                f"set_log_level: {level!r} is not a level, which are trace, debug, info, warning,"
                " error and critical"
            ) from None


class Address:
    """The address of an engine; ``str()`` returns the text for other processes."""

    def __init__(self, text: str, engine: Engine | None = None) -> None:
        self._text = text
        self._engine = engine

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Address({self._text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> tuple[type[Address], tuple[str]]:
        return Address, (self._text,)  # without the engine

    def copy(self) -> Address:
        """Return an equal address."""
        return Address(self._text, self._engine)

    def shutdown(self) -> None:
        """Request the engine at this address to finalize.

        Raises:
            PermissionDenied: it has not enabled remote shutdown.
            ConnectionFailed: no engine listens there.
        """
        from warabi.remote.link import WireLink

        if self._engine is None:
            raise errors.ConnectionFailed(
                f"shutdown {self._text}: no engine is running at this address"
            )
        connections = state_of(self._engine).connections
        WireLink(lambda: connections.get(self._text), 0).call("shutdown")


class Connections:
    """The connections of one engine to others, one for each address, and separate ones for
    read-only access, opened when first needed.

    Args:
        patience: timeouts of each.
        security: what is presented to others, and required of them.
        share: whether to use direct access to regions of other processes on this host.
    """

    def __init__(self, patience: Patience, security: Security, share: bool = True) -> None:
        self.patience = patience
        self._security = security
        self._share = share
        self._side: dict[tuple[str, int, bool], DirectAccessChannel] = {}
        self._lock = forks.lock()
        self._open: dict[tuple[str, bool], BlockingConnection] = {}
        self._closed = False
        forks.register(self)

    def _forked(self) -> None:
        # The side channels stay: handles refer to them, and each begins anew by itself.
        self._open = {}

    def get(self, text: str, read_only: bool = False) -> BlockingConnection:
        """Return a usable connection to *text*; raises as ``BlockingConnection`` does."""
        key = (text, read_only)
        found = self._open.get(key)
        if found is not None and found.usable and not self._closed:
            return found
        # Without the lock, which close() holds until pending requests have ended.
        self._check_open(text)
        with self._lock:
            self._check_open(text)
            found = self._open.get(key)
            if found is None or not found.usable:
                found = BlockingConnection(
                    address.parse(text), self.patience, self._security, read_only
                )
                self._open[key] = found
            return found

    def _check_open(self, text: str) -> None:
        if self._closed:
            raise errors.ConnectionFailed(f"connect to {text}: the engine is finalized")

    def side_channel(
        self, text: str, provider_id: int, read_only: bool
    ) -> DirectAccessChannel | None:
        """Return direct access to the regions of a provider; None if that is not possible."""
        endpoint = address.parse(text)
        if not (self._share and endpoint.local):
            return None

        def connect() -> BlockingConnection:
            return BlockingConnection(
                endpoint, self.patience, self._security, read_only, descriptors=True
            )

        with self._lock:
            if self._closed:
                return None
            key = (text, provider_id, read_only)
            if key not in self._side:
                self._side[key] = DirectAccessChannel(connect, provider_id, writable=not read_only)
            return self._side[key]

    def alone(self, text: str) -> BlockingConnection:
        """Return a new connection that the caller shares with no other, and closes."""
        return BlockingConnection(address.parse(text), self.patience, self._security)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for channel in self._side.values():
                channel.close()
            self._side.clear()
            for connection in self._open.values():
                connection.close()
            self._open.clear()


class EngineState:
    """The state of an engine.  It never refers to the ``Engine``, so that that can be collected."""

    def __init__(self, connections: Connections, portable: dict[str, Any] | str) -> None:
        self.connections = connections
        self.portable = portable  # see processes.portable()
        self.runtime: ProviderLoop | None = None
        self.parent = 0  # the serving process, if this one was forked from it
        self.lock = forks.lock()
        self.finalized = forks.event()
        self.wanted = forks.event()  # wait_for_finalize() should return
        self.wakers: list[Callable[[], None]] = []  # called when it is set
        self.before: list[Callable[[], object]] = []
        self.after: list[Callable[[], object]] = []
        forks.register(self)

    def _forked(self) -> None:
        """In a forked child: becomes a client's engine; the callbacks belong to the parent."""
        if not self.finalized.is_set():
            self.wanted.clear()
        self.wakers, self.before, self.after = [], [], []
        if self.runtime is not None:
            self.parent = self.runtime.pid
            self.runtime = None

    def wake(self) -> None:
        """Make ``wait_for_finalize`` return."""
        self.wanted.set()
        for waker in list(self.wakers):
            waker()

    def finalize(self) -> None:
        with self.lock:
            if self.finalized.is_set():
                return
            try:
                for callback in self.before:
                    callback()
                self.connections.close()
            finally:
                _unfinalized.discard(self)
                try:
                    if self.runtime is not None:
                        self.runtime.stop()
                finally:
                    self.finalized.set()
                    self.wake()
        for callback in self.after:
            callback()

    def finalize_soon(self) -> None:
        """Finalize from the engine's own loop, which cannot wait for itself."""
        self.wake()
        threading.Thread(target=self.finalize, name="warabi-finalize").start()


def state_of(engine: Engine) -> EngineState:
    """Return the state of *engine*, for the modules of the API."""
    return engine._state  # noqa: SLF001 - programs see only the documented names of an Engine


_unfinalized: set[EngineState] = set()
"""Engines to finalize at interpreter exit."""


@atexit.register
def _finalize_all() -> None:
    for state in list(_unfinalized):
        try:
            state.finalize()
        except Exception:
            Engine.logger.exception("finalizing an engine at interpreter exit failed")


def _finalize_collected(state: EngineState) -> None:
    """Finalize a garbage-collected engine, in a separate thread: the collector runs anywhere, in
    the engine's loop or in a call that holds a target's lock."""

    def finalize() -> None:
        try:
            state.finalize()
        except Exception:
            Engine.logger.exception("finalizing a garbage-collected engine failed")

    with contextlib.suppress(RuntimeError):  # the interpreter is exiting, which finalizes it
        _thread.start_new_thread(finalize, ())


class Engine:
    """This process's endpoint of the network.

    Args:
        addr: the transport, and optionally where to listen: ``na+sm``, ``tcp``,
            ``ofi+tcp://127.0.0.1:5555``.
        mode: ``server`` or ``client``.
        use_progress_thread: accepted for compatibility; progress is always made.
        num_rpc_threads: accepted for compatibility.
        config: dict or JSON text; ``timeout``, seconds without a sign of life from a provider
            after which a call fails (default 60); ``deadline``, seconds after which it fails
            even with signs of life (by default 5 times ``timeout`` for calls that only read, 60
            times for those that may wait for stable storage or for a migration); ``tls``,
            ``token``, ``token_file``, ``read_only_token``, ``read_only_token_file`` and
            ``insecure``, authentication and permissions, see docs/security.md; ``limits``, limits
            on peers; ``share`` (default true), whether processes of the same host may have direct
            access to regions, in memory or files that they share with the provider, in either mode.
            Margo's own keys (``warabi._core.config_keys.MARGO``) have no effect, which is logged.

    Raises:
        ConfigError: a malformed address or configuration, for example an unknown key, or it
            cannot listen there.
        PermissionDenied: it would listen beyond loopback, unprotected; or a file with a secret
            is accessible to every user.
    """

    logger = EngineLogger(logging.getLogger("warabi"), {})

    def __init__(
        self,
        addr: str,
        mode: Mode = server,
        use_progress_thread: bool = False,
        num_rpc_threads: int = 0,
        config: str | dict[str, Any] = "",
    ) -> None:
        settings = engine_settings.parse(config)
        if settings.without_effect:
            self.logger.debug(
                "engine configuration: accepted but without effect: %s",
                ", ".join(settings.without_effect),
            )
        endpoint = address.parse(addr, complete=False)
        portable = processes.portable(addr, config)
        if not isinstance(mode, Mode):
            raise errors.ConfigError(f"engine mode: expected client or server, got {mode!r}")
        self._mode = mode
        self._config = {
            "timeout": settings.patience.silence,
            "deadline": settings.patience.deadline,
            "share": settings.share,
        }
        interrupts.uninterrupted(self._begin, endpoint, settings, portable)

    def _begin(
        self, endpoint: Endpoint, settings: EngineSettings, portable: dict[str, Any] | str
    ) -> None:
        connections = Connections(settings.patience, settings.security, settings.share)
        self._state = state = EngineState(connections, portable)
        if self._mode is server:
            loop = extras.load("warabi.provider.loop", "server")
            state.runtime = loop.ProviderLoop(
                endpoint,
                settings.security,
                settings.limits,
                state.finalize_soon,
                share=settings.share,
            )
            endpoint = state.runtime.endpoint
        elif endpoint.local:
            endpoint = Endpoint(endpoint.scheme, name=f"{os.getpid()}-0")
        self._address = Address(str(endpoint))  # without self, which would be a cycle
        _unfinalized.add(state)
        weakref.finalize(self, _finalize_collected, state).atexit = False
        processes.remember(self)

    def __reduce__(self) -> str:
        raise TypeError(
            "an Engine cannot be pickled or copied, its sockets and threads belong to this process;"
            " pass str(engine.addr()), or a TargetHandle, and make an engine in the other process"
        )

    def addr(self) -> Address:
        """Return the address that other processes can connect to."""
        return Address(str(self._address), self)

    @property
    def address(self) -> Address:
        """The same as :meth:`addr`."""
        return self.addr()

    @property
    def config(self) -> dict[str, Any]:
        """The configuration for calls of other engines, defaults filled in: ``timeout`` and
        ``deadline`` in seconds (None: it depends on the call), and ``share``.  Secrets and paths
        of secrets are left out."""
        return dict(self._config)

    @property
    def listening(self) -> bool:
        """Whether other processes can connect."""
        return self._state.runtime is not None and not self._state.finalized.is_set()

    def lookup(self, address: str) -> Address:
        """Parse *address*.

        Raises:
            ConfigError: it is malformed.
        """
        from warabi.protocol.address import parse

        return Address(str(parse(address)), self)

    def on_prefinalize(self, callback: Callable[[], object]) -> None:
        """Call *callback* before the engine stops."""
        self._state.before.append(callback)

    def on_finalize(self, callback: Callable[[], object]) -> None:
        """Call *callback* when the engine has stopped."""
        self._state.after.append(callback)

    def enable_remote_shutdown(self) -> None:
        """Allow peers to stop this engine with ``Address.shutdown()``."""
        if self._state.runtime is not None:
            self._state.runtime.remote_shutdown = True

    def finalize(self) -> None:
        """Stop: no more connections, every provider closed, nothing deleted.  Idempotent."""
        interrupts.uninterrupted(self._state.finalize)

    def wait_for_finalize(self) -> None:
        """Return when the engine is finalized: by another thread or process, SIGINT or SIGTERM.

        Raises:
            ConfigError: this process was forked from the one that serves.
        """
        if self._state.parent:
            raise errors.ConfigError(
                f"wait_for_finalize: the engine {self._address} belongs to process"
                f" {self._state.parent}, from which this one was forked; wait there"
            )
        if threading.current_thread() is not threading.main_thread():
            self._state.wanted.wait()
            self._state.finalize()
            self._state.finalized.wait()
            return
        # Handlers stay until everything is persisted: the default handler would kill the process.
        with ShutdownSignals() as ending:
            self._state.wakers.append(ending.come)
            try:
                if not self._state.wanted.is_set():
                    ending.wait()
            finally:
                self._state.wakers.remove(ending.come)
            self._state.finalize()
            self._state.finalized.wait()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.finalize()

    def __repr__(self) -> str:
        return f"Engine({str(self._address)!r}, {self._mode.value})"
