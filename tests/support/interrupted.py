"""Calls that SIGINT interrupts at random moments, for ``provider/test_interrupts.py``.

``interrupted.py WAY COUNT [PATH]``, with WAY one of those in ``WAYS``.  Another process sends the
signals, each some time after it was told to, so that they come at any point of a call.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support.helpers import MEMORY, file_config, provider_process
from warabi.client import AsyncRequest, Client, RegionID, TargetHandle
from warabi.engine import Engine, client
from warabi.errors import ConnectionLost
from warabi.server import Provider

WAYS = ("embedded", "shared", "messages")
_SENDER = """
import os, signal, sys, time
for line in sys.stdin.buffer:
    for delay in line.split():
        until = time.perf_counter_ns() + int(delay)
        while time.perf_counter_ns() < until:
            pass
        os.kill(os.getppid(), signal.SIGINT)
    os.write(1, b".")
"""
SIZE, LARGE = 5000, 300_000


class Signals:
    """Sends a SIGINT soon."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SENDER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._sent = self._process.stdin.fileno(), self._process.stdout.fileno()

    def interrupt(self, call: Callable[[], object], delay: float, again: bytes = b"") -> bool:
        """Have a signal come, after *delay* seconds, in one of several of *call*; whether it was
        interrupted.  Returns when the signal has come, and another one *again* ns later."""
        interrupted = False
        sent: list[bytes] = []
        # At most two of these blocks are interrupted.
        try:
            try:
                try:
                    os.write(self._orders, b"%d %b\n" % (int(delay * 1e9), again))
                    until = time.perf_counter() + delay + 0.01
                    while time.perf_counter() < until:
                        call()
                except KeyboardInterrupt:
                    interrupted = True
                self._wait_sent(sent)
            except KeyboardInterrupt:
                interrupted = True
            self._wait_sent(sent)
        except KeyboardInterrupt:
            interrupted = True
        self._wait_sent(sent)
        return interrupted

    def _wait_sent(self, sent: list[bytes]) -> None:
        if not sent:
            sent.extend(map(os.read, (self._sent,), (1,)))  # in one step
        time.sleep(0.0002)

    def close(self) -> None:
        with self._process:
            self._process.kill()


@contextlib.contextmanager
def opened(way: str, path: str) -> Iterator[tuple[TargetHandle, TargetHandle]]:
    """A handle, and one of another engine, to look with."""
    config = file_config(Path(path)) if path else MEMORY
    with contextlib.ExitStack() as stack:
        if way == "embedded":
            engine = stack.enter_context(Engine("na+sm"))
            stack.enter_context(Provider(engine, 1, config))
            address = str(engine.addr())
        else:
            address = stack.enter_context(provider_process("na+sm", config)).address
            share = {"share": way == "shared"}
            engine = stack.enter_context(Engine("na+sm", client, config=share))
        other = stack.enter_context(Engine("na+sm", client))
        yield (
            Client(engine).make_target_handle(address, 1),
            Client(other).make_target_handle(address, 1),
        )


def main(way: str, count: int, path: str = "") -> None:
    random.seed(way + path)
    with opened(way, path) as (handle, other):
        region, large = handle.create_and_write(b"0" * SIZE), handle.create_and_write(b"0" * LARGE)
        known = {region, large}
        buffer, place = bytearray(SIZE), bytearray(LARGE)

        def make(create: Callable[[Any], RegionID], what: object) -> Callable[[], None]:
            def call() -> None:
                # A step of the loop is not interrupted between what create() returns and its use.
                for made in map(create, (what,)):
                    known.add(made)

            return call

        def begin(start: Callable[..., AsyncRequest], *what: Any) -> Callable[[], None]:
            def call() -> None:
                for request in map(start, *((argument,) for argument in what)):
                    pending.append(request)
                    end(request)
                    pending.clear()

            return call

        def end(request: AsyncRequest) -> None:
            for made in map(type(request).wait, (request,)):
                if made is not None:
                    known.add(made)

        interrupted: list[bool] = []
        pending: list[AsyncRequest] = []  # whose wait() was interrupted, maybe before it began
        calls: list[Callable[[], object]] = [
            make(handle.create, 1000),
            make(handle.create_and_write, b"x" * 3000),
            make(handle.create_and_write, b"x" * 400_000),
            make(lambda data: handle.create_and_write(data, True), b"x" * 100),
            begin(handle.create_async, 1000),
            begin(handle.create_and_write_async, b"x" * 3000),
            lambda: handle.write(region, 0, b"0" * SIZE),
            lambda: handle.write(large, 0, b"0" * LARGE),
            lambda: handle.write_vector(large, [(0, 10), (20, 10)], b"0" * 20),
            lambda: handle.read(region, 0, SIZE),
            lambda: handle.read_into(region, 0, buffer),
            lambda: handle.read_into(large, 0, place),
            lambda: handle.read_vector(large, [(0, 10), (20, 10)], memoryview(buffer)[:20]),
            begin(handle.read_async, region, 0, buffer),
            begin(handle.read_async, large, 0, place),
            begin(handle.write_async, region, 0, b"0" * SIZE),
            lambda: handle.persist(region, 0, SIZE),
            lambda: handle.stat(region),
            lambda: handle.size(region),
            lambda: handle.resize(region, SIZE + random.randrange(9)),
            lambda: handle.list_names("/"),
            lambda: list(handle.list()),
        ]
        times = []
        for call in calls:
            began = time.perf_counter()
            for _ in range(4):
                call()
            times.append((time.perf_counter() - began) / 4)
        # Another thread's calls end well, or with an error of the library.
        stop = threading.Event()
        thread = threading.Thread(target=_others, args=(handle, region, stop))
        signals = Signals()
        try:
            for number in range(count):
                if number == count // 2 and way != "embedded":
                    thread.start()
                which = random.randrange(len(calls))
                delay = random.random() * 1.3 * times[which]
                was = signals.interrupt(calls[which], delay, b"%d" % random.randrange(60_000))
                interrupted.append(was)
                while pending:
                    with contextlib.suppress(ConnectionLost):  # it was given up
                        end(pending.pop())
                buffer[:] = place[:SIZE] = b"z" * SIZE
                assert handle.read(region, 0, 100) == b"0" * 100
                assert handle.read(large, LARGE - 1, 1) == b"0"
                handle.write(region, 1, b"0")
                assert buffer == place[:SIZE] == b"z" * SIZE, which
                for made in known - {region, large}:
                    handle.erase(made)
                    known.discard(made)
        finally:
            stop.set()
            if thread.ident is not None:
                thread.join(60)
            signals.close()
        deadline = time.monotonic() + 20
        while set(other.list()) != known and time.monotonic() < deadline:
            time.sleep(0.01)
        found = set(other.list())
        assert found == known, (found - known, known - found)
        for made in known:
            handle.erase(made)
        assert not thread.is_alive()
        assert sum(interrupted) > count / 4, sum(interrupted)
    print("done")


def _others(handle: TargetHandle, region: RegionID, stop: threading.Event) -> None:
    while not stop.is_set():
        with contextlib.suppress(ConnectionLost):
            assert handle.read(region, 0, SIZE)[:100] == b"0" * 100


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
