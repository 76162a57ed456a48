"""Ctrl-C at any moment, and answers that never come."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

import warabi.aio
from tests.support.helpers import (
    PATIENCE,
    ROOT,
    RawPeer,
    environment,
    file_config,
    half_reply,
    run_python,
)
from warabi._core import interrupts
from warabi.client import Client, RegionID
from warabi.engine import Engine, client
from warabi.errors import ConfigError, ConnectionLost, TimedOut
from warabi.metadata.catalogue import Catalogue
from warabi.protocol.pending import Patience
from warabi.remote.connection import BlockingConnection
from warabi.server import Provider

REGION = RegionID(bytes(15) + b"1")


def test_what_was_made_is_removed_although_ctrl_c_comes_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When it was made, and as its removal begins, before that defers signals."""
    real, undone = interrupts.uninterrupted, list[int]()
    calls = iter(["after", "before", "not at all"])

    def uninterrupted(call: Callable[..., None], *arguments: Any) -> None:
        comes = next(calls)
        if comes == "before":
            raise KeyboardInterrupt
        real(call, *arguments)
        if comes == "after":
            raise KeyboardInterrupt

    monkeypatch.setattr(interrupts, "uninterrupted", uninterrupted)
    with pytest.raises(KeyboardInterrupt):
        interrupts.creating(lambda: 1, undone.append)
    assert undone == [1]
    assert list(calls) == []


@pytest.mark.parametrize(
    ("way", "kind", "count"),
    [
        ("embedded", "memory", 1000), ("embedded", "file", 200), ("shared", "memory", 400),
        ("shared", "file", 100), ("messages", "memory", 400), ("messages", "file", 100),
    ],
)  # fmt: skip
def test_calls_interrupted_anywhere(tmp_path: Path, way: str, kind: str, count: int) -> None:
    """SIGINT comes twice, shortly one after the other.  The next call works, buffers stay as they
    are, no region is left, and nothing hangs."""
    path = [str(tmp_path / "target")] if kind == "file" else []
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.interrupted", way, str(count), *path],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=3 * PATIENCE,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


BEGINNINGS = """
import os, signal, sys, threading, time, random
from tests.support.interrupted import Signals
from warabi.client import Client
from warabi.engine import Engine, client
from warabi.server import Provider
config = {"path": sys.argv[1], "create_if_missing": True}
def once(kept=[]):
    with Engine("na+sm") as engine:
        with Provider(engine, 1, {"target": {"type": "file", "config": config}}) as provider:
            with Engine("na+sm", client) as other:
                handle = Client(other).make_target_handle(str(engine.addr()), 1)
                handle.create(10)
once()
signals = Signals()
interrupted = sum(signals.interrupt(once, random.random() * 0.03) for _ in range(60))
signals.close()
assert interrupted > 30, interrupted
deadline = time.monotonic() + 30
while True:  # an engine that was collected is finalized in a thread
    try:
        once()
        break
    except Exception:
        assert time.monotonic() < deadline
        time.sleep(0.05)
print("done")
"""


def test_engines_and_providers_interrupted_anywhere(tmp_path: Path) -> None:
    done = run_python(BEGINNINGS, str(tmp_path / "target"))
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@contextlib.contextmanager
def interrupt_soon(seconds: float) -> Iterator[None]:
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(seconds, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    try:
        yield
    finally:
        timer.join(PATIENCE)


def test_an_interrupted_read_while_another_thread_receives() -> None:
    """Its reply, half of which is in the buffer, goes nowhere, and the other thread goes on."""
    with half_reply() as (address, provider), Engine("tcp", client) as engine:
        handle = Client(engine).make_target_handle(address, 1)
        buffer = bytearray(300_000)
        errors: list[BaseException] = []

        def other() -> None:
            try:
                handle.size(REGION)
            except BaseException as error:
                errors.append(error)

        request = handle.read_async(REGION, 0, buffer)
        thread = threading.Thread(target=other)
        thread.start()  # it receives
        while not buffer.startswith(b"r"):
            time.sleep(0.001)
        with pytest.raises(KeyboardInterrupt), interrupt_soon(0.2):
            request.wait()
        buffer[:] = bytes(300_000)
        provider.send_rest()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert all(isinstance(error, warabi.client.Exception) for error in errors)
        with pytest.raises(ConnectionLost, match="interrupted"):
            request.wait()
        assert buffer == bytes(300_000)


def test_a_reader_interrupted_again_as_it_resigns(monkeypatch: pytest.MonkeyPatch) -> None:
    """It wakes no successor, and puts nothing right; the other thread notices by itself."""
    answer = threading.Event()

    def serve(listener: socket.socket) -> None:
        accepted, _ = listener.accept()
        with accepted, contextlib.suppress(EOFError, ConnectionError):
            peer = RawPeer(accepted)
            while True:
                number, _, name, *_ = peer.reply()
                if name == "size":
                    answer.wait(PATIENCE)
                if name != "read":
                    peer.send([number, 7 if name == "size" else None])

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with stub(serve) as address, Engine("tcp", client) as engine:
        handle = Client(engine).make_target_handle(address, 1)
        sizes: list[int] = []
        thread = threading.Thread(target=lambda: sizes.append(handle.size(REGION)))
        follow = BlockingConnection._follow
        main = threading.main_thread().ident
        assert main is not None

        def following(*arguments: Any) -> None:
            signal.pthread_kill(main, signal.SIGINT)
            follow(*arguments)

        monkeypatch.setattr(BlockingConnection, "_follow", following)
        starter = threading.Timer(0.1, thread.start)
        starter.start()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(BlockingConnection, "_resigned", interrupted)
            patch.setattr(BlockingConnection, "_recover", interrupted)
            handle.read(REGION, 0, 10)
        answer.set()
        starter.join(PATIENCE)
        thread.join(PATIENCE / 2)
        assert sizes == [7]


def test_a_handler_that_raises_something_else() -> None:
    class Stop(Exception):
        pass

    def handler(number: int, frame: object) -> None:
        raise Stop

    def interrupted() -> str:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stop):
            interrupts.check()
        signal.raise_signal(signal.SIGINT)
        reached.append(True)
        return "result"

    reached: list[bool] = []
    undone: list[str] = []
    before = signal.signal(signal.SIGINT, handler)
    try:
        for _ in range(2):
            with pytest.raises(Stop):
                interrupts.creating(interrupted, undone.append)
            assert signal.getsignal(signal.SIGINT) is handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert interrupts.uninterrupted(lambda: 1) == 1
    finally:
        signal.signal(signal.SIGINT, before)
    assert undone == ["result"] * 2
    assert reached == [True] * 2


def test_a_creation_whose_answer_does_not_come_is_interrupted_and_undone_later() -> None:
    erased = threading.Event()
    resume = threading.Event()

    def serve(listener: socket.socket) -> None:
        accepted, _ = listener.accept()
        with accepted, contextlib.suppress(EOFError, ConnectionError):
            peer = RawPeer(accepted)
            while True:
                number, _, name, arguments, _ = peer.reply()
                if name == "create":
                    resume.wait(PATIENCE)
                    peer.send([number, bytes(REGION)])
                    continue
                if name == "erase" and arguments == [bytes(REGION)]:
                    erased.set()
                peer.send([number, 7 if name == "size" else None])

    with stub(serve) as address, Engine("tcp", client) as engine:
        handle = Client(engine).make_target_handle(address, 1)
        with pytest.raises(KeyboardInterrupt), interrupt_soon(0.1):
            handle.create(10)
        resume.set()
        assert handle.size(REGION) == 7
        assert handle.size(REGION) == 7
        assert erased.wait(PATIENCE)


# Deadlines


@contextlib.contextmanager
def stub(serve: object) -> Iterator[str]:
    """The address of a provider that *serve* plays."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))  # type: ignore[arg-type]
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            thread.join(PATIENCE)
            assert not thread.is_alive()


def pings_only(listener: socket.socket) -> None:
    """Answers pings, and sizes, and nothing else."""
    accepted, _ = listener.accept()
    with accepted, contextlib.suppress(EOFError, ConnectionError):
        peer = RawPeer(accepted)
        while True:
            number, _, name, *_ = peer.reply()
            if name in ("ping", "size"):
                peer.send([number, None if name == "ping" else 7])


def test_a_lost_reply_ends_a_blocking_call() -> None:
    config = {"timeout": 3, "deadline": 4}
    with stub(pings_only) as address, Engine("tcp", client, config=config) as engine:
        handle = Client(engine).make_target_handle(address, 1)
        buffer = bytearray(10)
        began = time.monotonic()
        request = handle.persist_async(REGION, 0, 1)
        with pytest.raises(TimedOut, match="4 s, its deadline"):
            handle.read_into(REGION, 0, buffer)
        assert time.monotonic() - began > 3.9
        assert handle.size(REGION) == 7  # the connection is as good as before
        with pytest.raises(TimedOut, match="deadline"):
            request.wait()


def test_a_lost_reply_while_another_thread_is_answered() -> None:
    config = {"timeout": 30, "deadline": 2}
    stop = threading.Event()
    with stub(pings_only) as address, Engine("tcp", client, config=config) as engine:
        handle = Client(engine).make_target_handle(address, 1)

        def sizes() -> None:
            while not stop.is_set():
                assert handle.size(REGION) == 7

        thread = threading.Thread(target=sizes)
        thread.start()
        try:
            with pytest.raises(TimedOut, match="deadline"):
                handle.read(REGION, 0, 10)
        finally:
            stop.set()
            thread.join(PATIENCE)


def test_a_lost_reply_ends_a_trio_call() -> None:
    async def main(address: str) -> None:
        async with warabi.aio.connect(address, 1, timeout=0.4, deadline=1.5) as target:
            began = trio.current_time()
            buffer = bytearray(10)
            with pytest.raises(TimedOut, match="is alive, but has not completed this request"):
                await target.read_into(REGION, 0, buffer)
            assert trio.current_time() - began > 1.4
            assert await target.size(REGION) == 7

    with stub(pings_only) as address:
        trio.run(main, address)


def test_for_how_long_replies_are_waited_for() -> None:
    patience = Patience(60)
    assert patience.of("read") == patience.of("size") == 300
    assert patience.of("persist") == patience.of("write") == patience.of("sync") == 3600
    assert patience.of("watch") == patience.of("receive_commit") == float("inf")
    assert Patience(60, 5).of("persist") == 5
    assert Patience(60, 5).of("receive_commit") == float("inf")
    for wrong in (0, -1, "5", True, None, 1e10):
        with pytest.raises(ConfigError, match=r"\$\.deadline"):
            Engine("tcp", client, config={"deadline": wrong})
    with Engine("tcp", client, config={"deadline": 9}) as engine:
        assert Client(engine).get_config() == '{"timeout": 60.0, "deadline": 9.0}'


def test_a_recovery_is_interrupted_and_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "target"
    done = run_python(UNCLOSED, str(path))
    assert done.returncode == -signal.SIGKILL, done.stderr
    looked: list[RegionID] = []
    trim = Catalogue.trim

    def interrupted(catalogue: Catalogue) -> None:
        trim(catalogue)
        looked.append(REGION)
        if len(looked) == 2:
            signal.raise_signal(signal.SIGINT)

    with Engine("na+sm") as engine:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Catalogue, "trim", interrupted)
            Provider(engine, 1, file_config(path))
        assert len(looked) == 2  # of 5
        with Provider(engine, 1, file_config(path)):
            handle = Client(engine).make_target_handle(str(engine.addr()), 1)
            for number, region in enumerate(handle.list()):
                assert handle.read(region, 99_999, 1) == bytes([number])
            assert number == 4


UNCLOSED = """
import os, sys
from tests.support.helpers import file_config
from warabi.client import Client
from warabi.engine import Engine
from warabi.server import Provider
engine = Engine("na+sm")
provider = Provider(engine, 1, file_config(sys.argv[1]))
handle = Client(engine).make_target_handle(str(engine.addr()), 1)
for number in range(5):
    handle.create_and_write(bytes([number]) * 100_000, persist=True)
os.kill(os.getpid(), 9)
"""


def test_a_second_interrupt_does_not_cut_the_end_short(tmp_path: Path) -> None:
    """What is written is persisted by the engine's end, whatever comes meanwhile."""
    with pytest.raises(KeyboardInterrupt), Engine("na+sm") as engine:
        Provider(engine, 1, file_config(tmp_path / "target"))
        handle = Client(engine).make_target_handle(str(engine.addr()), 1)
        region = handle.create_and_write(b"data")
        engine.on_prefinalize(lambda: os.kill(os.getpid(), signal.SIGINT))
        raise KeyboardInterrupt
    with Engine("na+sm") as engine, Provider(engine, 1, file_config(tmp_path / "target")):
        handle = Client(engine).make_target_handle(str(engine.addr()), 1)
        assert handle.read(region, 0, 4) == b"data"
