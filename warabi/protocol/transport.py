"""The layer between a connected socket and the protocol: nothing, or TLS.

Both kinds have the same two methods.  ``recv_into`` is the socket's own, or returns decrypted
bytes; ``sealed`` converts outgoing data to the bytes for the socket.  The callers send to, wait
for and close the socket, and handle deadlines, threads and event loops; nothing here blocks unless
the socket does.

TLS is OpenSSL on two memory buffers and never touches the socket by itself.  ``_lock`` is held
while OpenSSL works and never during a system call, so a thread can encrypt while another waits for
bytes to decrypt.  Records must reach the socket in the order in which they were created: a caller
must send one from ``sealed`` before another takes the next.

The end of the stream without a TLS close alert is accepted: messages contain their length, so
truncation within a message is detected anyway.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from warabi._core import forks
from warabi.errors import ConnectionLost, PermissionDenied, ProtocolError, TimedOut
from warabi.errors import Exception as WarabiError
from warabi.protocol import address
from warabi.protocol.address import Endpoint

if TYPE_CHECKING:
    import ssl  # slow to import, and not needed without TLS

    from warabi.protocol.auth import Security

Part = bytes | bytearray | memoryview

NO_TLS = b"\x15\x03\x01\x00\x02\x02\x46"
"""The alert for peers that do not speak TLS; OpenSSL sends none."""
_PIECE = 256 * 1024  # bytes encrypted before they are sent; bounds the copied data
_STORE = 64 * 1024  # bytes read from the socket at once


class Plain:
    """No encryption."""

    def __init__(self, sock: socket.socket) -> None:
        self.recv_into = sock.recv_into

    def sealed(self, parts: Sequence[Part]) -> Iterable[list[Part]]:
        """Yield lists of buffers to send for *parts*, in chunks."""
        return (list(parts),)


class Tls:
    """TLS on a connected socket, before its handshake.

    Args:
        sock: the socket; blocking, with a timeout, or non-blocking.
        context: contains the certificates, and the requirements on the peer's.
        name: the host name that the peer's certificate must have; None on the server's side.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, name: str | None) -> None:
        import ssl

        self._socket = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(
            self._incoming, self._outgoing, server_side=name is None, server_hostname=name
        )
        # With a buffer argument read() returns a count, which its annotation omits.
        self._read: Callable[[int, memoryview], int] = self._object.read  # type: ignore[assignment]
        self._want_read = ssl.SSLWantReadError
        self._ended = (ssl.SSLZeroReturnError, ssl.SSLEOFError)
        self._error = ssl.SSLError
        self._lock = forks.lock()
        self._store = memoryview(bytearray(_STORE))

    def shake_hands(self) -> bool:
        """Continue the handshake; returns False when bytes from the peer are needed.

        The result of :meth:`unsent` must be sent after each call, even if it raised.

        Raises:
            ConnectionResetError: the peer closed the connection.
            PermissionDenied: one side rejects the other's certificate.
            ProtocolError: the peer does not speak TLS, or there is no common version.
        """
        try:
            self._object.do_handshake()
        except self._want_read:
            return False
        except self._ended:
            raise ConnectionResetError("the peer closed the connection") from None
        except self._error as error:
            raise _explained(error) from error
        return True

    def unsent(self) -> bytes:
        """Return the handshake's pending bytes for the peer."""
        return self._outgoing.read()

    def receive(self, flags: int = 0) -> None:
        """Read pending bytes from the socket; raises as ``socket.recv_into`` does."""
        count = self._socket.recv_into(self._store, 0, flags)
        with self._lock:
            if count:
                self._incoming.write(self._store[:count])
            else:
                self._incoming.write_eof()

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0) -> int:
        """The same as ``socket.recv_into``, for decrypted bytes.

        Raises:
            PermissionDenied: the peer rejected this side's certificate after the handshake.
            ProtocolError: the data are not TLS, or were tampered with.
        """
        while True:
            with self._lock:
                count = self._decrypt(buffer[:nbytes] if nbytes else buffer)
            if count is not None:
                return count
            self.receive(flags)

    def _decrypt(self, buffer: memoryview) -> int | None:
        """Fill *buffer* as far as possible; None if there is nothing to decrypt."""
        count = 0
        try:
            while count < len(buffer):
                got = self._read(len(buffer) - count, buffer[count:])
                if got == 0:
                    break
                count += got
        except self._want_read:
            return count or None
        except self._ended:
            pass
        except self._error as error:
            if not count:  # otherwise report it on the next call, after the data before it
                raise _explained(error) from error
        return count

    def sealed(self, parts: Sequence[Part]) -> Iterator[list[Part]]:
        """The same as for ``Plain``, encrypted."""
        pending = 0
        for part in parts:
            rest = memoryview(part)
            while rest:
                with self._lock:
                    try:
                        count = self._object.write(rest[: _PIECE - pending])
                    except self._error as error:
                        raise _explained(error) from error
                rest = rest[count:]
                pending += count
                if pending == _PIECE:
                    yield [self._outgoing.read()]
                    pending = 0
        if pending:
            yield [self._outgoing.read()]


Transport = Plain | Tls


def _explained(error: ssl.SSLError) -> WarabiError:
    """Convert an error of TLS to an exception of the library."""
    reason = error.reason or str(error)
    words = reason.replace("_", " ").lower()
    refused = getattr(error, "verify_message", "")
    if refused:
        return PermissionDenied(f"TLS: the peer's certificate was rejected: {refused}")
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return PermissionDenied("TLS: the peer has no certificate")
    if "PROTOCOL_VERSION" in reason or "UNSUPPORTED_PROTOCOL" in reason:
        return ProtocolError("TLS: no common protocol version; TLS 1.3 is required")
    if "ALERT" in reason and ("CERTIFICATE" in reason or "UNKNOWN_CA" in reason):
        return PermissionDenied(f"TLS: the peer rejected our certificate ({words})")
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "BAD_RECORD_TYPE"):
        return ProtocolError("TLS: the peer does not speak TLS")
    return ProtocolError(f"TLS: {words}")


def connect(
    endpoint: Endpoint, timeout: float, security: Security
) -> tuple[socket.socket, Transport]:
    """Connect, with TLS if it is configured and *endpoint* is not local; returns a blocking socket
    and its transport.

    Raises:
        ConnectionFailed, PermissionDenied, ProtocolError, TimedOut: as ``address.connect``, or for
            errors of TLS.
    """
    sock = address.connect(endpoint, timeout)
    if endpoint.local or security.tls is None:
        return sock, Plain(sock)
    try:
        tls = Tls(sock, security.tls.client, security.tls.server_name or endpoint.host)
        _handshake(tls, sock, time.monotonic() + timeout)
        sock.settimeout(None)
    except BaseException as error:
        sock.close()
        if isinstance(error, PermissionDenied | ProtocolError):
            raise type(error)(f"connect to {endpoint}: {error}") from error
        if isinstance(error, TimeoutError):
            raise TimedOut(f"{endpoint}: connected, but the peer does not respond") from None
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise ConnectionLost(f"{endpoint}: {reason} while connecting") from error
        raise
    return sock, tls


def _handshake(tls: Tls, sock: socket.socket, deadline: float) -> None:
    done = False
    while not done:
        try:
            done = tls.shake_hands()
        finally:
            if unsent := tls.unsent():
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                sock.sendall(unsent)
        if not done:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            tls.receive()
