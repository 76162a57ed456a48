"""An HTTP server for metrics and the status page, in threads of its own.

The requests are few and their answers small, so the server of the standard library is enough; what
it lacks is here: TLS with certificates of both sides, tokens, and limits on connections.

It has to be protected as the engine is, with one difference.  A client of an engine proves that it
has the token without sending it; in HTTP it is sent.  So beyond loopback a token without TLS does
not suffice.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import ipaddress
import logging
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from warabi._core import descriptors, forks
from warabi._core.log_limit import RateLimit
from warabi._core.tuning import ACCEPT_PAUSE, HTTP_PATIENCE, HTTP_TURN
from warabi.errors import ConfigError, PermissionDenied
from warabi.protocol import address
from warabi.protocol.address import Endpoint
from warabi.protocol.auth import Security

log = logging.getLogger(__name__)
log.addFilter(RateLimit())  # messages are caused by peers

_MOST = 32
"""Connections at once; more are closed."""
Page = WSGIApplication
"""Answers GET requests for one path."""
_PLAIN = ("Content-Type", "text/plain; charset=utf-8")


class _Handler(WSGIRequestHandler):
    timeout = HTTP_PATIENCE  # of each receive and send

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s: %s", self.client_address[0], format % args)


class HttpServer(socketserver.ThreadingMixIn, WSGIServer):
    """Serves pages until closed.

    Args:
        option: what says where, for messages, such as ``--metrics`` and a blank.
        where: ``HOST:PORT``, or a port of loopback; port 0 for any that is free.
        security: what is required of peers.
        pages: by path.
        tick: called twice a second.

    Raises:
        ConfigError: *where* is malformed, or it cannot listen there.
        PermissionDenied: *where* is beyond loopback, and neither TLS nor ``insecure`` is set.
    """

    daemon_threads = True

    def __init__(
        self,
        option: str,
        where: str,
        security: Security,
        pages: Mapping[str, Page],
        tick: Callable[[], object] = lambda: None,
    ) -> None:
        endpoint = _endpoint(option, where)
        self._tick = tick
        self._tls = security.tls.server if security.tls is not None else None
        listener = _listen(option, where, endpoint, security)
        self._open: dict[int, tuple[socket.socket, float]] = {}  # by thread, and since when
        super().__init__(("", 0), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        ip, self.server_port, *_ = self.server_address = listener.getsockname()
        self.server_name = endpoint.host
        self.setup_environ()
        loopback = ipaddress.ip_address(ip).is_loopback
        self.set_app(_checked(pages, security, endpoint.host if loopback else None))
        host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        self.url = f"http{'s' * (self._tls is not None)}://{host}:{self.server_port}"
        forks.register(self)
        self._thread = threading.Thread(
            target=self.serve_forever, args=(HTTP_TURN,), name="warabi-http", daemon=True
        )
        self._thread.start()

    def _forked(self) -> None:
        connections = [connection.fileno() for connection, _ in self._open.copy().values()]
        forks.disconnect(fd for fd in (self.socket.fileno(), *connections) if fd >= 0)

    def close(self) -> None:
        """End all connections and the server."""
        self.shutdown()
        self._thread.join()
        self.server_close()
        self._end(time.monotonic())

    def service_actions(self) -> None:
        """Called twice a second: end connections that take too long in all."""
        self._tick()
        self._end(time.monotonic() - HTTP_PATIENCE)

    def _end(self, since: float) -> None:
        for connection, began in self._open.copy().values():
            if began <= since:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def get_request(self) -> tuple[Any, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if descriptors.are_short(error):
                log.error("monitoring: accept: %s; pausing", error.strerror)
                time.sleep(ACCEPT_PAUSE)
            raise  # it is tried again

    def verify_request(self, request: Any, client_address: Any) -> bool:
        if len(self._open) < _MOST:
            return True
        log.warning("monitoring: %d connections are open; refusing another one", _MOST)
        return False

    def process_request(self, request: Any, client_address: Any) -> None:
        request.settimeout(HTTP_PATIENCE)
        super().process_request(request, client_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """In a thread of this connection."""
        thread = threading.get_ident()
        try:
            self._open[thread] = request, time.monotonic()
            if self._tls is None:
                super().finish_request(request, client_address)
                return
            with self._tls.wrap_socket(
                request, server_side=True, do_handshake_on_connect=False
            ) as encrypted:
                self._open[thread] = encrypted, time.monotonic()
                encrypted.do_handshake()
                super().finish_request(encrypted, client_address)
        finally:
            del self._open[thread]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Called while an exception is handled."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):  # errors of TLS are, too
            log.info("monitoring: connection of %s: %s", client_address[0], error)
        else:
            message = "monitoring: unhandled exception in a connection; closing it"
            log.error(message, exc_info=error)


def _endpoint(option: str, where: str) -> Endpoint:
    text = f"127.0.0.1:{where}" if where.isdecimal() else where
    try:
        endpoint = address.parse(f"tcp://{text}")
        if endpoint.scheme == "tcp" and "://" not in text:
            return endpoint
    except ConfigError:
        with contextlib.suppress(ConfigError):
            free = address.parse(f"tcp://{text}", complete=False)
            if text.endswith(":0"):
                return free
    raise ConfigError(f"{option}{where}: expected HOST:PORT, such as 127.0.0.1:9100")


def _listen(option: str, where: str, endpoint: Endpoint, security: Security) -> socket.socket:
    try:
        protected = security.insecure or security.tls is not None
        listener, _ = address.listen(endpoint, protected=protected)
    except PermissionDenied:
        raise PermissionDenied(
            f"{option}{where}: is not a loopback address; this needs TLS, since a token alone"
            " would be readable on the network, or the setting insecure"
        ) from None
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"address {endpoint}", f"{option}{where}")) from None
    return listener


def _checked(pages: Mapping[str, Page], security: Security, host: str | None) -> WSGIApplication:
    """Return an application that checks requests, and has *pages* answer them.

    Without a token or TLS, requests to loopback must name *host* or an IP: a page of another site
    in a browser of this host could have its own name resolve to this server.
    """
    open_to_all = not security.tokens and security.tls is None

    def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _refuse(start, "405 Method Not Allowed", "only GET and HEAD", ("Allow", "GET"))
        if host is not None and open_to_all and not _is_local_name(environ, host):
            return _refuse(start, "403 Forbidden", "the Host header does not name this server")
        if security.tokens and not _has_token(environ, security):
            ask = ("WWW-Authenticate", 'Basic realm="warabi, password: the token"')
            return _refuse(start, "401 Unauthorized", "the token is missing or wrong", ask)
        page = pages.get(environ.get("PATH_INFO") or "/")
        if page is None:
            return _refuse(start, "404 Not Found", f"there are: {', '.join(pages)}")
        is_head, environ["REQUEST_METHOD"] = environ["REQUEST_METHOD"] == "HEAD", "GET"
        try:
            found = list(page(environ, start))
        except Exception as error:
            log.warning("monitoring: no report could be made: %s", error, exc_info=True)
            return _refuse(start, "503 Service Unavailable", "no report could be made; see the log")
        return [] if is_head else found

    return answer


def _refuse(start: StartResponse, status: str, text: str, *more: tuple[str, str]) -> list[bytes]:
    start(status, [_PLAIN, *more])
    return [f"{status}: {text}\n".encode()]


def _is_local_name(environ: WSGIEnvironment, host: str) -> bool:
    named = urlsplit(f"//{environ.get('HTTP_HOST', '')}").hostname or ""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(named)
        return True
    return named in ("localhost", host)


def _has_token(environ: WSGIEnvironment, security: Security) -> bool:
    kind, _, value = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    given = value.strip().encode("latin-1", "replace")
    if kind.lower() == "basic":
        with contextlib.suppress(ValueError):
            given = base64.b64decode(given, validate=True).partition(b":")[2]
    elif kind.lower() != "bearer":
        return False
    found = False
    for token, _ in security.tokens:  # all of them, whichever it is
        found |= hmac.compare_digest(token, given)
    return found
