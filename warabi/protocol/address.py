"""Addresses of engines: parsing, listening, and connecting."""

from __future__ import annotations

import array
import contextlib
import itertools
import os
import re
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from warabi.errors import ConfigError, ConnectionFailed, PermissionDenied
from warabi.protocol import socket_directories

LOCAL = "na+sm"
_TCP_SCHEMES = ("tcp", "ofi+tcp", "ofi+tcp;ofi_rxm", "na+tcp")
_ADDRESS = re.compile(r"(?P<scheme>[a-z][a-z0-9+;_]*)(?:://(?P<rest>.*))?")
_BACKLOG = 4096
"""Length of the accept queue; a client that finds it full retries after a second."""
_ANCILLARY = socket.CMSG_SPACE(16 * array.array("i").itemsize)
_OVERRIDE = "WARABI_RUNTIME_DIR"
_counter = itertools.count()


@dataclass(frozen=True)
class Endpoint:
    """A parsed address.

    Attributes:
        scheme: as written, such as ``na+sm`` or ``ofi+tcp``.
        name: ``<pid>-<n>`` of a local engine; empty for TCP and for any free name.
        host: of TCP, without brackets.
        port: of TCP; 0 for any free port.
    """

    scheme: str
    name: str = ""
    host: str = ""
    port: int = 0

    @property
    def local(self) -> bool:
        return self.scheme == LOCAL

    def __str__(self) -> str:
        if self.local:
            return f"{self.scheme}://{self.name}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def parse(text: str, *, complete: bool = True) -> Endpoint:
    """Parse an address.

    Args:
        text: ``na+sm``, ``na+sm://<pid>-<n>``, ``tcp``, ``ofi+tcp://host:port`` and the like.
        complete: whether it must be possible to connect to it; a listener may omit parts.

    Raises:
        ConfigError: the address is not valid.
    """
    match = _ADDRESS.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ConfigError(f"address {text!r}: expected SCHEME or SCHEME://..., such as na+sm")
    scheme, rest = match["scheme"], match["rest"] or ""
    if scheme == LOCAL:
        if rest and not re.fullmatch(r"\d+-\d+", rest):
            raise ConfigError(f"address {text!r}: expected na+sm://<pid>-<n>")
        if complete and not rest:
            raise ConfigError(
                f"address {text!r}: does not name an engine, expected na+sm://<pid>-<n>"
            )
        return Endpoint(scheme, name=rest)
    if scheme not in _TCP_SCHEMES:
        known = ", ".join((LOCAL, *_TCP_SCHEMES))
        raise ConfigError(
            f"address {text!r}: unknown transport {scheme!r}, expected one of {known}"
        )
    host, port = _host_and_port(text, rest)
    if complete and not (host and port):
        raise ConfigError(f"address {text!r}: expected {scheme}://host:port")
    return Endpoint(scheme, host=host or "127.0.0.1", port=port)


def _host_and_port(text: str, rest: str) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[(?P<v6>[^]]+)\]|(?P<host>[^:/\[\]]*))(?::(?P<port>\d+))?", rest)
    if match is None or int(match["port"] or 0) > 65535:
        raise ConfigError(f"address {text!r}: expected host:port with a port up to 65535")
    return match["v6"] or match["host"] or "", int(match["port"] or 0)


def runtime_directory() -> Path:
    """Return the directory for this process's local sockets; creates it if it is missing.

    Raises:
        PermissionDenied: other users have access to it, or it cannot be created.
    """
    override = os.environ.get(_OVERRIDE)
    if not override:
        return socket_directories.made(os.getuid())
    directory = Path(override)
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        is_private = socket_directories.is_private(directory, os.getuid())
    except OSError as error:
        raise PermissionDenied(f"{_OVERRIDE}={directory}: {error.strerror}") from error
    if not is_private:
        raise PermissionDenied(
            f"{_OVERRIDE}={directory}: must be a directory with mode 0700, owned by this user"
        )
    return directory


def listen(wanted: Endpoint, *, protected: bool) -> tuple[socket.socket, Endpoint]:
    """Return a listening, non-blocking socket for *wanted*, and the endpoint to connect to.

    Raises:
        ConfigError: the host is unknown, or the address is in use.
        PermissionDenied: not allowed, or beyond loopback and not *protected*.
    """
    if wanted.local:
        return _listen_local()
    try:
        infos = socket.getaddrinfo(
            wanted.host, wanted.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:  # UnicodeError: the host name cannot be encoded
        raise ConfigError(f"address {wanted}: {getattr(error, 'strerror', '') or error}") from None
    family, _, _, _, where = infos[0]
    loopback = str(where[0]).startswith("127.") or where[0] == "::1"
    if not (loopback or protected):
        raise PermissionDenied(
            f"address {wanted}: is not a loopback address, so every host could access everything;"
            ' the engine configuration needs "tls" (certificates), "token_file" (authentication'
            ' without encryption), or {"insecure": true} if every host is trusted'
        )
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(f"address {wanted}: cannot listen: {error.strerror}") from error
    return listener, Endpoint(wanted.scheme, host=wanted.host, port=listener.getsockname()[1])


def _listen_local() -> tuple[socket.socket, Endpoint]:
    directory = runtime_directory()
    _remove_stale(directory)
    endpoint = Endpoint(LOCAL, name=f"{os.getpid()}-{next(_counter)}")
    path = directory / f"{endpoint.name}.sock"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)  # of an earlier process with this PID
        listener.bind(str(path))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(f"socket {path}: cannot listen: {error.strerror}") from error
    return listener, endpoint


def _remove_stale(directory: Path) -> None:
    """Remove the sockets of killed processes."""
    for path in directory.glob("*-*.sock"):
        pid = path.name.split("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            path.unlink(missing_ok=True)


def local_path(endpoint: Endpoint) -> Path:
    """Return the socket of a local engine, in a directory of the user that runs the engine."""
    name = f"{endpoint.name}.sock"
    override = os.environ.get(_OVERRIDE)
    if override:
        return Path(override, name)
    pid = endpoint.name.split("-")[0]
    try:
        uid = Path("/proc", pid).stat().st_uid
    except OSError:
        uid = os.getuid()
    found = (directory / name for directory in socket_directories.existing(uid))
    return next((path for path in found if path.exists()), socket_directories.places(uid)[0] / name)


def connect(endpoint: Endpoint, timeout: float) -> socket.socket:
    """Connect to an engine; returns a blocking socket.

    Raises:
        ConnectionFailed: no engine listens there, or it did not accept within *timeout* seconds.
        PermissionDenied: the peer is another user's process.
    """
    try:
        if not endpoint.local:
            client = socket.create_connection((endpoint.host, endpoint.port), timeout)
            prepare(client)
        else:
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            # Not by settimeout(): unlike TCP, connect(2) on a non-blocking local socket fails if
            # the queue is full, which happens when many clients connect at once.
            set_send_timeout(client, timeout)
            try:
                client.connect(str(local_path(endpoint)))
            except BaseException:
                client.close()
                raise
            set_send_timeout(client, 0.0)
    except UnicodeError as error:  # the host name cannot be encoded
        raise ConnectionFailed(f"connect to {endpoint}: {error}") from None
    except PermissionError as error:
        raise PermissionDenied(f"connect to {endpoint}: {error.strerror}") from error
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            reason = "no such engine"
        elif isinstance(error, BlockingIOError):
            reason = f"it did not accept the connection within {timeout:g} s"
        raise ConnectionFailed(f"connect to {endpoint}: {reason}") from error
    if endpoint.local and peer(client)[1] not in (os.getuid(), 0) and os.getuid() != 0:
        client.close()
        raise PermissionDenied(f"connect to {endpoint}: the peer is another user's process")
    client.settimeout(None)
    return client


def prepare(connection: socket.socket) -> None:
    """Set the options of a TCP connection, on either side."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):  # the peer has closed it; the next operation fails
        if connection.getsockname()[0] == connection.getpeername()[0]:
            # Within a host there is no congestion.  The system's default algorithm may pace the
            # data with timers, as BBR does, which cost more than sending.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def set_send_timeout(connection: socket.socket, timeout: float) -> None:
    """Set the timeout of blocking sends and connects, in seconds; 0 for none."""
    seconds = int(timeout)
    value = struct.pack("@ll", seconds, int((timeout - seconds) * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def receive_with_descriptors(
    connection: socket.socket, found: list[int], place: memoryview, _: int = 0, flags: int = 0
) -> int:
    """The same as ``recv_into`` of a local socket; received descriptors are added to *found*."""
    count, ancillary, _, _ = connection.recvmsg_into(
        [place], _ANCILLARY, flags | socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            found += numbers
    return count


def peer(connection: socket.socket) -> tuple[int, int]:
    """Return PID and user ID of the peer of a local socket; PID 0: in another PID namespace."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid, _ = struct.unpack("3i", credentials)
    return pid, uid
