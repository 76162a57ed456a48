"""An echo server, the lower bound for two processes: ``python -m benchmarks.echo SOCKET``.

Listens on a Unix socket and on TCP.  A request is two numbers: how many bytes follow, and how many
to answer with.  Prints the TCP port, and the address of memory that another process may read.
"""

from __future__ import annotations

import ctypes
import socket
import struct
import sys
import threading

LARGEST = 16 << 20
REQUEST = struct.Struct("<QQ")


def receive(connection: socket.socket, view: memoryview) -> bool:
    """Fill *view*; False when the peer went away."""
    while view:
        count = connection.recv_into(view)
        if not count:
            return False
        view = view[count:]
    return True


def _serve(connection: socket.socket) -> None:
    buffer = memoryview(bytearray(b"e" * LARGEST))
    head = memoryview(bytearray(REQUEST.size))
    with connection:
        while receive(connection, head):
            coming, wanted = REQUEST.unpack(head)
            if not receive(connection, buffer[:coming]):
                return
            connection.sendall(buffer[:wanted])


def _listen(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        if connection.family == socket.AF_INET:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_serve, args=(connection,), daemon=True).start()


def main() -> None:
    local = socket.socket(socket.AF_UNIX)
    local.bind(sys.argv[1])
    local.listen()
    tcp = socket.create_server(("127.0.0.1", 0))
    memory = ctypes.create_string_buffer(b"m" * LARGEST)
    for listener in (local, tcp):
        threading.Thread(target=_listen, args=(listener,), daemon=True).start()
    print(tcp.getsockname()[1], ctypes.addressof(memory), flush=True)
    sys.stdin.read()  # until the parent ends this, or itself


if __name__ == "__main__":
    main()
