"""Systems that the API is compared with: limits of the machine, and other stores.

Every peer moves *size* bytes from or to a place that was touched before, by a call that returns
when they are there.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing import shared_memory
from pathlib import Path

import numpy

from benchmarks.echo import LARGEST, REQUEST, receive
from benchmarks.processes import PATIENCE, Failed, line_of, running
from benchmarks.stats import Work

MEMCPY = "memcpy"
PING_UNIX = "ping-pong, Unix socket"
PING_CORES = "ping-pong, Unix socket, two cores"
PING_TCP = "ping-pong, TCP"
COPY_UNIX = "bare copy, Unix socket"
COPY_TCP = "bare copy, TCP"
SHARED_MEMORY = "multiprocessing.shared_memory"
REDIS = "Redis, Unix socket"
VM_READV = "process_vm_readv"
FILE = "pread/pwrite"
SYNCED = "pwrite + fdatasync"
MADE = "open + ftruncate + close"
FILLED = "open + pwrite + close"
REMOVED = "unlink"
KERNEL = {"create": MADE, "create_and_write": FILLED, "persist": SYNCED, "erase": REMOVED}
"""By operation: the system calls that a region's file takes, in any process."""

Maker = Callable[[int], Work]
"""Makes the work of moving so many bytes."""


def _bytes(size: int) -> bytes:
    """Bytes with memory of their own; zeros would all be the kernel's one page of them."""
    return b"p" * size


def memcpy(size: int) -> Work:
    source = numpy.ones(size, dtype=numpy.uint8)
    place = numpy.full(size, 2, dtype=numpy.uint8)
    return Work(partial(numpy.copyto, place, source), size=size)


def _exchange(connection: socket.socket, head: bytes, data: memoryview, place: memoryview) -> None:
    connection.sendall(head)
    if data:
        connection.sendall(data)
    receive(connection, place)


def _copy(connection: socket.socket, pid: int, writing: bool, size: int) -> Work:
    """Send *size* bytes and hear that they came, or ask for them."""
    sent, wanted = (size, 1) if writing else (0, size)
    head = REQUEST.pack(sent, wanted)
    data, place = memoryview(_bytes(sent)), memoryview(bytearray(_bytes(wanted)))
    moved = size if size > 1 else 0  # what a GiB of single bytes costs says nothing
    return Work(partial(_exchange, connection, head, data, place), size=moved, pids=[pid])


class _Remote(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


def _vm_readv(pid: int, address: int, size: int) -> Work:
    call = ctypes.CDLL(None, use_errno=True).process_vm_readv
    call.restype = ctypes.c_ssize_t
    place = ctypes.create_string_buffer(_bytes(size), size)
    here = ctypes.byref(_Remote(ctypes.addressof(place), size))
    there = ctypes.byref(_Remote(address, size))
    if call(pid, here, 1, there, 1, 0) != size:
        raise Failed(f"process_vm_readv: {os.strerror(ctypes.get_errno())}")

    def read(keep: object = place) -> None:
        call(pid, here, 1, there, 1, 0)

    return Work(read, size=size, pids=[pid])


@contextlib.contextmanager
def _socket_path() -> Iterator[Path]:
    """Where a Unix socket may be; paths of sockets must be short."""
    with tempfile.TemporaryDirectory(prefix="wrb") as directory:
        yield Path(directory, "socket")


@contextlib.contextmanager
def echo() -> Iterator[dict[str, tuple[Maker, Maker]]]:
    """Peers that are another process: how they write and how they read."""
    with (
        _socket_path() as path,
        running([sys.executable, "-m", "benchmarks.echo", path]) as process,
        socket.socket(socket.AF_UNIX) as local,
    ):
        port, address = map(int, line_of(process).split())
        local.connect(str(path))
        with socket.create_connection(("127.0.0.1", port)) as tcp:
            tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pid = process.pid

            def both(connection: socket.socket) -> tuple[Maker, Maker]:
                return partial(_copy, connection, pid, True), partial(_copy, connection, pid, False)

            vm_read = partial(_vm_readv, pid, address)
            yield {COPY_UNIX: both(local), COPY_TCP: both(tcp), VM_READV: (vm_read, vm_read)}


def on_two_cores(work: Work) -> Work:
    """*work* with another process, each on a core of its own, which has to be woken.

    Where the scheduler puts both on one core an exchange takes a tenth of the time.
    """
    cores = sorted(os.sched_getaffinity(0))
    mine, other = cores[0], cores[-1]

    def pin() -> None:
        os.sched_setaffinity(0, [mine])
        for thread in _threads(work.pids):
            os.sched_setaffinity(thread, [other])

    def unpin() -> None:
        for thread in (0, *_threads(work.pids)):
            os.sched_setaffinity(thread, cores)

    work.begin, work.after = pin, unpin
    return work


def _threads(pids: Iterable[int]) -> list[int]:
    return [int(task) for pid in pids for task in os.listdir(f"/proc/{pid}/task")]


@contextlib.contextmanager
def shared() -> Iterator[tuple[Maker, Maker]]:
    """Python's own memory shared by processes."""
    memory = shared_memory.SharedMemory(create=True, size=LARGEST)
    try:
        view = memory.buf
        assert view is not None
        view[:] = bytes(LARGEST)

        def write(size: int) -> Work:
            data = _bytes(size)

            def call() -> None:
                view[:size] = data

            return Work(call, size=size)

        def read(size: int) -> Work:
            place = memoryview(bytearray(_bytes(size)))

            def call() -> None:
                place[:] = view[:size]

            return Work(call, size=size)

        yield write, read
    finally:
        memory.close()
        memory.unlink()


@contextlib.contextmanager
def redis_server(directory: Path) -> Iterator[tuple[Maker, Maker]]:
    """A private Redis on a Unix socket, which keeps nothing on the disk.

    Raises:
        Failed: it, or its client, is not installed.
    """
    # Debian has both programs in one file; which one it is, its name in argv[0] says.
    executable = shutil.which("redis-server") or shutil.which("redis-check-rdb")
    try:
        import redis  # for tools/bench only
    except ImportError:
        raise Failed("redis-py is not installed") from None
    if executable is None:
        raise Failed("redis-server is not installed")
    command = ["redis-server", "--port", "0", "--save", "", "--dir", str(directory)]
    with (
        _socket_path() as path,
        running([*command, "--unixsocket", str(path)], executable) as process,
    ):
        deadline = time.monotonic() + PATIENCE
        while not path.exists():  # made when it listens
            if process.poll() is not None or time.monotonic() > deadline:
                raise Failed("redis-server does not start")
            time.sleep(0.01)
        with redis.Redis(unix_socket_path=str(path)) as client:
            client.set("region", _bytes(LARGEST))

            def write(size: int) -> Work:
                call = partial(client.setrange, "region", 0, _bytes(size))
                return Work(call, size=size, pids=[process.pid])

            def read(size: int) -> Work:
                call = partial(client.getrange, "region", 0, size - 1)
                return Work(call, size=size, pids=[process.pid])

            yield write, read


@contextlib.contextmanager
def file(directory: Path) -> Iterator[dict[str, tuple[Maker, Maker]]]:
    """A file, in the page cache or synced, as a program would use it without this project."""
    fd = os.open(directory / "file", os.O_RDWR | os.O_CREAT)
    try:
        for start in range(0, LARGEST, 1 << 20):
            os.pwrite(fd, _bytes(1 << 20), start)
        os.fsync(fd)

        def write(size: int) -> Work:
            return Work(partial(os.pwrite, fd, _bytes(size), 0), size=size)

        def read(size: int) -> Work:
            return Work(partial(os.preadv, fd, [bytearray(_bytes(size))], 0), size=size)

        def synced(size: int) -> Work:
            data = _bytes(size)

            def call() -> None:
                os.pwrite(fd, data, 0)
                os.fdatasync(fd)

            return Work(call)

        made, filled = partial(_new_file, directory, False), partial(_new_file, directory, True)
        removed = partial(_removed, directory)
        yield {
            FILE: (write, read), SYNCED: (synced, read),
            MADE: (made, made), FILLED: (filled, filled), REMOVED: (removed, removed),
        }  # fmt: skip
    finally:
        os.close(fd)


_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


def _new_file(directory: Path, filled: bool, size: int) -> Work:
    """A new file of *size* bytes, made with *filled* by writing them; in 256 directories, as the
    files of regions are."""
    place = tempfile.mkdtemp(dir=directory)
    shards = [f"{place}/{number:02x}" for number in range(256)]
    for shard in shards:
        os.mkdir(shard)
    names = itertools.count()
    data = _bytes(size)

    def make() -> None:
        name = next(names)
        fd = os.open(f"{shards[name % 256]}/{name}", _NEW, 0o600)
        if filled:
            os.pwrite(fd, data, 0)
        else:
            os.ftruncate(fd, size)
        os.close(fd)

    def remove() -> None:
        for shard in shards:
            for name in os.listdir(shard):
                os.unlink(f"{shard}/{name}")

    return Work(make, after=remove, most=5000 if size < 1 << 20 else 100)


def _removed(directory: Path, size: int) -> Work:
    """A new file of *size* bytes, removed."""
    path = f"{tempfile.mkdtemp(dir=directory)}/file"

    def make() -> None:
        fd = os.open(path, _NEW, 0o600)
        os.ftruncate(fd, size)
        os.close(fd)

    return Work(partial(os.unlink, path), before=make)
