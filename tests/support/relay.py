"""A relay in front of an engine: an address that stays, and connections that can be cut."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

from tests.support.helpers import PATIENCE
from warabi.protocol import address


class Relay:
    """Hands bytes to and fro between its clients and the engine at *engine*.

    Attributes:
        engine: the address that new connections go to; none for now when empty.
        swallow: cut the connection where the next bytes of the engine would be handed on.
    """

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.swallow = False
        self.connections = 0
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    engine = address.connect(address.parse(self.engine), 10.0)
                except Exception:
                    client.close()
                    continue
                with self._lock:
                    self._sockets |= {client, engine}
                self.connections += 1
                self._start(self._pump, client, engine, False)
                self._start(self._pump, engine, client, True)

    def _pump(self, source: socket.socket, sink: socket.socket, replies: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if replies and self.swallow:
                    self.swallow = False
                    break
                sink.sendall(data)
        self._cut(source, sink)

    def _cut(self, *sockets: socket.socket) -> None:
        with self._lock:
            for each in sockets:
                if each in self._sockets:
                    self._sockets.remove(each)
                    with contextlib.suppress(OSError):
                        each.shutdown(socket.SHUT_RDWR)
                    each.close()

    def cut(self) -> None:
        """End every connection; new ones are possible while there is an engine."""
        self._cut(*list(self._sockets))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.engine = ""
        self.cut()
        for thread in self._threads:
            thread.join(PATIENCE)


@contextlib.contextmanager
def relay(engine: str) -> Iterator[Relay]:
    """A relay while the block runs."""
    found = Relay(engine)
    try:
        yield found
    finally:
        found.close()
