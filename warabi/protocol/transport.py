"""What is between a connected socket and the protocol: nothing, or TLS.

Both kinds have the same two methods.  ``recv_into`` is the socket's own, or gives decrypted bytes
in its place; ``sealed`` turns what is to be sent into what goes to the socket.  Sockets are sent
to, waited for and closed by those who use them, so deadlines, threads and event loops are
their affair; nothing here waits unless the socket does.

TLS is OpenSSL on two memory buffers and never touches the socket by itself.  ``_lock`` is
held while OpenSSL works and never over a system call, so a thread can encrypt while another waits
for bytes to decrypt.  Records must reach the socket in the order in which they were made:
who takes one from ``sealed`` sends it before anybody takes the next.

The end of the stream without TLS's goodbye counts as its end: messages have a length, so a
connection that is cut within one is noticed all the same.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from warabi.errors import ConnectionLost, PermissionDenied, ProtocolError, TimedOut
from warabi.errors import Exception as WarabiError
from warabi.protocol import address
from warabi.protocol.address import Endpoint

if TYPE_CHECKING:
    import ssl  # takes time to import, which those without TLS need not

    from warabi.protocol.auth import Security

Part = bytes | bytearray | memoryview

NO_TLS = b"\x15\x03\x01\x00\x02\x02\x46"
"""The alert for those who do not speak TLS; OpenSSL has none for them."""
_PIECE = 256 * 1024  # bytes that are encrypted before they are sent: bounds what is held twice
_STORE = 64 * 1024  # bytes that are taken from the socket at once


class Plain:
    """Bytes as they are."""

    def __init__(self, sock: socket.socket) -> None:
        self.recv_into = sock.recv_into

    def sealed(self, parts: Sequence[Part]) -> Iterable[list[Part]]:
        """What has to be sent for *parts*, piece by piece."""
        return (list(parts),)


class Tls:
    """TLS on a connected socket, before its handshake.

    Args:
        sock: whose bytes it decrypts; blocking, with a time limit, or not blocking.
        context: with certificates, and what is demanded of the peer's.
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
        # With a buffer to fill it gives a number, which its type does not tell.
        self._read: Callable[[int, memoryview], int] = self._object.read  # type: ignore[assignment]
        self._want_read = ssl.SSLWantReadError
        self._ended = (ssl.SSLZeroReturnError, ssl.SSLEOFError)
        self._error = ssl.SSLError
        self._lock = threading.Lock()
        self._store = memoryview(bytearray(_STORE))

    def shake_hands(self) -> bool:
        """Go on with the handshake; False when bytes from the peer are needed.

        What :meth:`unsent` gives has to be sent after each call, also after one that raises.

        Raises:
            ConnectionResetError: the peer closed the connection.
            PermissionDenied: one side does not accept the other's certificate.
            ProtocolError: the peer does not speak TLS, or no version of it in common.
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
        """What the handshake has for the peer."""
        return self._outgoing.read()

    def receive(self, flags: int = 0) -> None:
        """Take what has come in from the socket; raises as ``socket.recv_into`` does."""
        count = self._socket.recv_into(self._store, 0, flags)
        with self._lock:
            if count:
                self._incoming.write(self._store[:count])
            else:
                self._incoming.write_eof()

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0) -> int:
        """As ``socket.recv_into``, of what was encrypted.

        Raises:
            PermissionDenied: the peer does not accept this side's certificate, after all.
            ProtocolError: what came is not TLS, or was tampered with.
        """
        while True:
            with self._lock:
                count = self._decrypt(buffer[:nbytes] if nbytes else buffer)
            if count is not None:
                return count
            self.receive(flags)

    def _decrypt(self, buffer: memoryview) -> int | None:
        """Fill *buffer* as far as possible; None when there is nothing to decrypt."""
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
            if not count:  # otherwise it comes again, after what came before it
                raise _explained(error) from error
        return count

    def sealed(self, parts: Sequence[Part]) -> Iterator[list[Part]]:
        """As of ``Plain``: encrypted."""
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
    """What the library raises for an error of TLS."""
    reason = error.reason or str(error)
    words = reason.replace("_", " ").lower()
    refused = getattr(error, "verify_message", "")
    if refused:
        return PermissionDenied(f"TLS: the peer's certificate is not accepted: {refused}")
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return PermissionDenied("TLS: the peer has no certificate")
    if "PROTOCOL_VERSION" in reason or "UNSUPPORTED_PROTOCOL" in reason:
        return ProtocolError("TLS: the two sides have no version in common, 1.3 is needed")
    if "ALERT" in reason and ("CERTIFICATE" in reason or "UNKNOWN_CA" in reason):
        return PermissionDenied(f"TLS: the peer does not accept this side's certificate ({words})")
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "BAD_RECORD_TYPE"):
        return ProtocolError("TLS: the peer does not speak TLS")
    return ProtocolError(f"TLS: {words}")


def connect(
    endpoint: Endpoint, timeout: float, security: Security
) -> tuple[socket.socket, Transport]:
    """A connected, blocking socket and what goes over it, with TLS if that is configured and
    *endpoint* is not local.

    Raises:
        ConnectionFailed, PermissionDenied, ProtocolError, TimedOut: as ``address.connect``, and
            what TLS finds wrong.
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
            raise TimedOut(f"{endpoint}: connected, but nothing answers") from None
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
