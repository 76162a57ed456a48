"""Forks, and handles in other processes: what a child does leaves its parent's target alone."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import copy
import gc
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from _thread import LockType
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trio

import warabi.aio
import warabi.asyncio
import warabi.reconnect
from tests.support.helpers import (
    MEMORY,
    PATIENCE,
    ROOT,
    Served,
    environment,
    file_config,
    half_reply,
    open_memory,
    provider_process,
    run_python,
)
from warabi import errors
from warabi._core import forks
from warabi.client import AsyncRequest, Client, RegionID, TargetHandle
from warabi.engine import Address, Engine, client
from warabi.errors import (
    ConfigError,
    ConnectionFailed,
    ConnectionLost,
    InvalidRegion,
    TargetNotFound,
)
from warabi.in_process.link import DirectLink
from warabi.remote.link import WireLink
from warabi.server import Provider
from warabi.target import opening
from warabi.target.config import FileConfig, MemoryConfig


class Child:
    """A forked child that does *work* and ends; what went wrong there is raised here."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                signal.alarm(int(PATIENCE))
                work()
                status = 0
            except BaseException:
                os.write(writer, traceback.format_exc().encode()[-4000:])
            finally:
                os._exit(status)
        os.close(writer)

    def join(self) -> None:
        with open(self._reader, "rb") as reader:
            said = reader.read().decode(errors="replace")
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        assert status == 0, f"the child ended with {status}: {said}"


def in_child(work: Callable[[], object]) -> None:
    Child(work).join()


@contextlib.contextmanager
def serving(config: dict[str, Any]) -> Iterator[tuple[Engine, Provider, TargetHandle]]:
    with Engine("na+sm") as engine, Provider(engine, 1, config) as provider:
        yield engine, provider, Client(engine).make_target_handle(str(engine.addr()), 1)


@pytest.fixture(params=["memory", "file"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return MEMORY if request.param == "memory" else file_config(tmp_path / "target")


# Forks of a process that serves


def test_a_childs_handles_go_to_the_parent(config: dict[str, Any]) -> None:
    with serving(config) as (_, _, handle):
        kept = [handle.create_and_write(b"-" * size) for size in (10, 1000, 100_000)]
        for _ in range(3):  # so that regions are reached directly
            assert [handle.read(region, 0, 1) for region in kept] == [b"-"] * 3

        def work() -> None:
            assert isinstance(handle._link, WireLink)
            made = [handle.create_and_write(b"c" * size) for size in (10, 1000, 100_000)]
            for region in made[:2]:
                handle.erase(region)
            for region in kept:
                assert handle.read(region, 0, 10) == b"-" * 10
                handle.write(region, 0, b"child")
            handle.persist(made[2], 0, 100_000)
            handle.link_name(made[2], "/child")

        child = Child(work)
        mine = [handle.create_and_write(b"P" * size) for size in (10, 1000, 100_000)]
        child.join()
        for region, size in zip(mine, (10, 1000, 100_000), strict=True):
            assert handle.read(region, 0, size) == b"P" * size
        assert [handle.read(region, 0, 6) for region in kept] == [b"child-"] * 3
        theirs = handle.open_name("/child")
        assert handle.read(theirs, 0, 100_000) == b"c" * 100_000
        assert set(handle.list()) == {*kept, *mine, theirs}


def test_a_fork_while_other_threads_are_in_calls(config: dict[str, Any]) -> None:
    failures: list[BaseException] = []
    stop = threading.Event()
    with serving(config) as (_, _, handle):

        def calls() -> None:
            try:
                while not stop.is_set():
                    region = handle.create_and_write(b"t" * 5000)
                    handle.resize(region, 6000)
                    handle.persist(region, 0, 6000)
                    assert handle.read(region, 4999, 2) == b"t\0"
                    handle.erase(region)
            except BaseException as error:
                failures.append(error)

        def work() -> None:
            region = handle.create_and_write(b"c" * 5000)
            handle.write(region, 0, b"x")
            assert handle.read(region, 0, 2) == b"xc"
            handle.erase(region)

        threads = [threading.Thread(target=calls) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(15):
                in_child(work)
        finally:
            stop.set()
            for thread in threads:
                thread.join(PATIENCE)
        assert not failures
        assert list(handle.list()) == []


def locks_of_the_library() -> list[LockType]:
    """Every lock that an object of the library has; those of conditions and events are its own."""
    made: list[Any] = list(forks._renewable)
    conditions = [getattr(each, "_cond", each) for each in made if not isinstance(each, LockType)]
    return [each for each in made if isinstance(each, LockType)] + [c._lock for c in conditions]


def names_of_locks(code: ast.AST) -> Iterator[str]:
    """The kinds of locks, of the standard library, that a module makes by itself."""
    kinds = {"Lock", "RLock", "Condition", "Event", "Semaphore", "BoundedSemaphore", "Barrier"}
    kinds |= {"allocate_lock", "LockType"}
    for node in ast.walk(code):
        if isinstance(node, ast.ImportFrom) and node.module in {"threading", "_thread"}:
            yield from (name.name for name in node.names if name.name in kinds)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id in {"threading", "_thread"}:
                yield from {node.func.attr} & kinds


def test_locks_are_made_where_children_find_them_free() -> None:
    own = {}
    for package in ("warabi", "warabifs", "mochi"):
        for path in (ROOT / package).rglob("*.py"):
            if found := list(names_of_locks(ast.parse(path.read_text()))):
                own[str(path.relative_to(ROOT))] = found
    # The latter is no lock around a block: what waits for it ends with the connection.
    assert own == {
        "warabi/_core/forks.py": ["Lock", "Condition", "Event"],
        "warabi/_core/interrupts.py": ["Lock"],
    }


def test_locks_conditions_and_events_are_free_in_a_child() -> None:
    lock, set_event, event = forks.lock(), forks.event(), forks.event()
    condition = forks.condition(lock)
    set_event.set()

    def wait() -> None:
        with condition:
            assert condition.wait(PATIENCE)
        assert event.wait(PATIENCE)

    def work() -> None:
        assert not lock.locked()
        assert set_event.is_set()
        assert not event.is_set()
        with condition:
            condition.notify_all()  # no thread waits
            assert not condition.wait(0.001)
        event.set()
        assert event.wait(PATIENCE)

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(wait) for _ in range(2)]
        while len(condition._waiters) < 2:  # type: ignore[attr-defined]
            time.sleep(0.001)
        with lock:
            child = Child(work)
        child.join()
        assert not event.is_set()
        with condition:
            condition.notify_all()
        event.set()
        for each in waiting:
            each.result(PATIENCE)


def test_a_child_waits_for_no_lock_that_was_held_when_it_was_forked(
    config: dict[str, Any], tmp_path: Path, local_process: Served
) -> None:
    with (
        serving(config) as (engine, provider, handle),
        Engine("na+sm", client) as other,
        contextlib.ExitStack() as pipe,
    ):
        theirs = Client(other).make_target_handle(local_process.address, 1)
        kept = [handle.create_and_write(b"-" * size) for size in (10, 100_000)]
        far = theirs.create_and_write(b"far")
        handle.persist(kept[0], 0, 10)
        for _ in range(3):  # so that regions are reached directly
            assert handle.read(kept[1], 0, 1) == b"-"
            assert theirs.read(far, 0, 3) == b"far"
        releases, released = (
            pipe.enter_context(open(end, mode, buffering=0))
            for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True)
        )

        def work() -> None:
            releases.read(1)  # what the child asks its parent for is answered again
            loggers = [logging.getLogger(name) for name in sorted(logging.root.manager.loggerDict)]
            for logger in loggers:
                if logger.name.startswith("warabi"):
                    logger.error("each logger of the library works")
            for each, region in ((handle, kept[0]), (handle, kept[1]), (theirs, far)):
                each.write(region, 0, b"c")
                assert each.read(region, 0, 1) == b"c"
                each.persist(region, 0, 1)
                each.erase(each.create(100))
            mine = file_config(tmp_path / "mine")
            with Engine("na+sm") as own, Provider(own, 1, mine):
                again = Client(own).make_target_handle(str(own.addr()), 1)
                assert again.read(again.create_and_write(b"own"), 0, 3) == b"own"
            provider.close()
            engine.finalize()
            other.finalize()
            gc.collect()

        locks = locks_of_the_library()
        assert len(locks) > 30
        held = [lock for lock in locks if lock.acquire(blocking=False)]
        try:
            child = Child(work)
        finally:
            for lock in held:
                lock.release()
        released.write(b"x")
        child.join()
        assert handle.read(kept[0], 0, 2) == b"c-"


def test_requests_of_the_parents_fail_in_the_child(config: dict[str, Any]) -> None:
    with serving(config) as (engine, provider, handle):
        region = handle.create(10)
        request = handle.write_async(region, 0, b"data", persist=True)
        link = handle._link
        assert isinstance(link, DirectLink)

        def work() -> None:
            with pytest.raises(TargetNotFound, match=f"belongs to process {os.getppid()}"):
                link.call("create", 10)
            with pytest.raises(TargetNotFound, match="was forked"):
                provider.migrate_target("na+sm://1-0", 1)
            with pytest.raises(ConfigError, match="was forked"):
                Provider(engine, 2, MEMORY)
            with pytest.raises(ConfigError, match="was forked"):
                engine.wait_for_finalize()
            assert not provider
            assert not engine.listening
            provider.close()
            engine.finalize()
            with pytest.raises(ConnectionFailed, match="finalized"):
                handle.create(1)

        in_child(work)
        request.wait()
        assert handle.read(region, 0, 4) == b"data"


def test_a_request_that_a_thread_carries_out_fails_in_the_child(tmp_path: Path) -> None:
    with serving(file_config(tmp_path / "target")) as (_, provider, handle):
        region = handle.create_and_write(b"data")
        changes = provider._core.changes
        changes.freeze(PATIENCE, lambda: False)  # so that the request is under way for certain
        request = handle.write_async(region, 0, b"more")
        creation = handle.create_async(10)

        def work() -> None:
            for each in (request, creation):
                with pytest.raises(ConnectionLost, match="parent process"):
                    each.wait()

        in_child(work)
        changes.thaw()
        request.wait()
        assert handle.read(region, 0, 4) == b"more"
        created = creation.wait()  # it is in no list before
        assert set(handle.list()) == {region, created}


SIGNALLED = """
import multiprocessing, os, signal, threading, time
from warabi._core import interrupts
from warabi.client import Client
from warabi.engine import Engine
from warabi.server import Provider

def sleep():
    ready.set()
    time.sleep(60)

def ended_by(number):
    child = context.Process(target=sleep)
    child.start()
    ready.wait()
    ready.clear()
    os.kill(child.pid, number)
    child.join(30)
    assert child.exitcode in (-number, 1), child.exitcode

def work():
    while signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        time.sleep(0.001)
    ended_by(signal.SIGTERM)
    ended_by(signal.SIGINT)
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.01)
    done.set()

os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the children's KeyboardInterrupt
signal.signal(signal.SIGUSR1, lambda *_: None)
context = multiprocessing.get_context("fork")
ready = context.Event()
with Engine("na+sm") as engine, Provider(engine, 1, {"target": {"type": "memory"}}):
    handle = Client(engine).make_target_handle(str(engine.addr()), 1)
    done = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    interrupts.uninterrupted(done.wait)
    thread.join()
    done = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    end = threading.Thread(target=lambda: (done.wait(), print(handle.create(1) != b""),
                                           os.kill(os.getpid(), signal.SIGTERM)))
    end.start()
    engine.wait_for_finalize()
    assert done.is_set()
    thread.join()
    end.join()
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
print("done")
"""


def test_signals_of_children_that_threads_fork() -> None:
    """They reach the child, whatever the parent's main thread waits for, and not the parent."""
    done = run_python(SIGNALLED)
    assert (done.returncode, done.stdout) == (0, "True\ndone\n"), done.stderr


def test_a_child_serves_for_itself(tmp_path: Path) -> None:
    with serving(MEMORY) as (_, _, handle):
        region = handle.create_and_write(b"parent")

        def work() -> None:
            with serving(file_config(tmp_path / "child")) as (_, _, own):
                mine = own.create_and_write(b"child")
                for _ in range(3):
                    assert own.read(mine, 0, 5) == b"child"
                with pytest.raises(InvalidRegion):
                    own.read(region, 0, 1)
                assert handle.read(region, 0, 6) == b"parent"

        in_child(work)
        assert handle.read(region, 0, 6) == b"parent"


def test_grandchildren(config: dict[str, Any]) -> None:
    with serving(config) as (_, _, handle):
        region = handle.create_and_write(b"0")

        def work(left: int) -> None:
            assert handle.read(region, 0, 1) == str(2 - left).encode()
            handle.write(region, 0, str(3 - left).encode())
            if left:
                in_child(lambda: work(left - 1))

        in_child(lambda: work(2))
        assert handle.read(region, 0, 1) == b"3"


def test_a_child_keeps_nothing_of_its_parents_open(tmp_path: Path) -> None:
    """Neither the target's lock nor its files, sockets and memory."""
    path = tmp_path / "target"
    done_reader, done = os.pipe()
    with serving(file_config(path)) as (engine, _, handle):
        regions = [handle.create_and_write(bytes(size), persist=True) for size in (10, 100_000)]
        for _ in range(3):
            for region in regions:
                handle.read(region, 0, 10)

        def work() -> None:
            os.close(done)
            names = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(256) if _is_open(fd)]
            assert not [name for name in names if str(path) in name or "memfd:warabi" in name]
            os.read(done_reader, 1)

        child = Child(work)
    with opening.open_file(FileConfig(path=str(path))) as target:  # while the child lives
        assert target.size(regions[1]) == 100_000
    os.close(done)
    os.close(done_reader)
    child.join()
    assert not engine.listening


def _is_open(fd: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{fd}")


ORPHAN = """
import os, signal, sys, time
from warabi.client import Client
from warabi.engine import Engine
from warabi.server import Provider
engine = Engine("na+sm")
config = {"path": sys.argv[1], "create_if_missing": True}
provider = Provider(engine, 1, {"target": {"type": "file", "config": config}})
child = os.fork()
if child == 0:
    os.read(0, 1)
    os._exit(0)
print(engine.addr(), flush=True)
time.sleep(60)
"""


def test_peers_see_the_end_of_a_parent_whose_child_lives_on(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(tmp_path / "target")],
        env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    with process, Engine("na+sm", client) as engine:
        address = process.stdout.readline().strip()
        handle = Client(engine).make_target_handle(address, 1)
        handle.create(10)
        process.kill()
        process.wait(PATIENCE)
        with pytest.raises((ConnectionLost, ConnectionFailed)):
            handle.create(10)
        with opening.open_file(FileConfig(path=str(tmp_path / "target"))) as target:
            assert target.room()[2] <= 1
    # The end of its input has ended the child.


EXITS = {
    "_exit": "os._exit(0)",
    "exit": "sys.exit(0)",
    "collected": "del engine, provider, handle, threads; gc.collect(); sys.exit(0)",
    "closed": "provider.close(); engine.finalize(); sys.exit(0)",
    "used": "handle.erase(handle.create(100_000)); sys.exit(0)",
    "raised": "sys.excepthook = lambda *_: None; raise ValueError",
    "aborted": "os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize(
    ("kind", "end"), [("memory", "_exit"), ("memory", "collected"), *(("file", e) for e in EXITS)]
)
def test_however_a_child_ends(tmp_path: Path, kind: str, end: str) -> None:
    script = f"""
import gc, os, signal, sys, threading, warnings
from warabi.client import Client
from warabi.engine import Engine, client
from warabi.server import Provider
engine = Engine("na+sm")
config = {{"path": sys.argv[1], "create_if_missing": True}} if {kind!r} == "file" else {{}}
provider = Provider(engine, 1, {{"target": {{"type": {kind!r}, "config": config}}}})
handle = Client(engine).make_target_handle(str(engine.addr()), 1)
remote = Client(Engine("na+sm", client)).make_target_handle(str(engine.addr()), 1)
stop = threading.Event()
def calls():
    while not stop.is_set():
        handle.erase(handle.create_and_write(bytes(3000)))
        remote.erase(remote.create(3000))
        stop.wait(0.001)
threads = [threading.Thread(target=calls) for _ in range(2)]
for thread in threads:
    thread.start()
regions = [handle.create_and_write(b"before", persist=True) for _ in range(5)]
for _ in range(3):
    assert all(remote.read(region, 0, 6) == b"before" for region in regions)
for _ in range(3):
    child = os.fork()
    if child == 0:
        {EXITS[end]}
    os.waitpid(child, 0)
stop.set()
for thread in threads:
    thread.join()
assert all(handle.read(region, 0, 6) == b"before" for region in regions)
assert set(remote.list()) == set(regions)
after = [remote.create_and_write(b"after", persist=True) for _ in range(5)]
assert all(handle.read(region, 0, 5) == b"after" for region in after)
provider.close()
provider = Provider(engine, 1, {{"target": {{"type": {kind!r}, "config": config}}}})
found = set(remote.list())
assert found == ({{*regions, *after}} if config else set()), len(found)
engine.finalize()
"""
    done = run_python(script, str(tmp_path / "target"))
    assert (done.returncode, done.stderr) == (0, "")


# Forks of a client


def test_a_clients_idle_connection(local_process: Served) -> None:
    with Engine("na+sm", client) as engine:
        handle = Client(engine).make_target_handle(local_process.address, 1)
        regions = [handle.create_and_write(b"0" * size) for size in (10, 100_000)]
        for _ in range(3):
            for region in regions:
                handle.read(region, 0, 1)

        def work() -> None:
            for region in regions:
                for _ in range(3):
                    assert handle.read(region, 0, 1) == b"0"
                handle.write(region, 1, b"c")
            side = handle._link._side  # type: ignore[attr-defined]
            assert side.guest is not None
            assert side.guest.usable  # the child reaches them directly, too, by grants of its own

        in_child(work)
        for region in regions:
            assert handle.read(region, 0, 3) == b"0c0"
            handle.erase(region)


def test_a_clients_request_under_way() -> None:
    buffer = bytearray(1000)
    with half_reply() as (address, provider), Engine("tcp", client) as engine:
        handle = Client(engine).make_target_handle(address, 1)
        request = handle.read_async(RegionID(bytes(15) + b"1"), 0, buffer)
        assert not request.completed()

        def work() -> None:
            with pytest.raises(ConnectionLost, match="parent process"):
                request.wait()
            assert request.completed()

        in_child(work)
        provider.send_rest()
        request.wait()
        assert buffer == b"r" * 1000


def test_a_clients_other_threads_are_in_calls(local_process: Served) -> None:
    failures: list[BaseException] = []
    stop = threading.Event()
    with Engine("na+sm", client, config={"share": False}) as engine:
        handle = Client(engine).make_target_handle(local_process.address, 1)
        region = handle.create_and_write(bytes(300_000))

        def calls() -> None:
            buffer = bytearray(300_000)
            try:
                while not stop.is_set():
                    handle.read_into(region, 0, buffer)
                    handle.write(region, 0, buffer)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=calls) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(15):
                in_child(lambda: handle.read(region, 0, 300_000))
        finally:
            stop.set()
            for thread in threads:
                thread.join(PATIENCE)
        assert not failures
        handle.erase(region)


def test_a_closed_engine(local_process: Served) -> None:
    with Engine("na+sm", client) as engine:
        handle = Client(engine).make_target_handle(local_process.address, 1)

    def work() -> None:
        with pytest.raises(ConnectionFailed, match="finalized"):
            handle.create(1)
        engine.finalize()

    in_child(work)


def test_a_trio_client(local_process: Served) -> None:
    async def main() -> None:
        async with warabi.aio.connect(local_process.address, 1) as target:
            region = await target.create_and_write(bytes(100_000))
            for _ in range(3):
                await target.read(region, 0, 10)

            def work() -> None:
                for call in (target.size(region), target.read(region, 0, 10), target.create(1)):
                    with pytest.raises(ConnectionLost, match="parent process"):
                        call.send(None)

            in_child(work)
            assert await target.size(region) == 100_000
            await target.write(region, 0, b"after")
            assert await target.read(region, 0, 5) == b"after"
            await target.erase(region)

    trio.run(main)


# Pools, pickles and copies


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("where", ["embedded", "na+sm", "tcp"])
def test_pools_of_processes(
    local_process: Served, tcp_process: Served, where: str, method: str
) -> None:
    addresses = {"embedded": "", "na+sm": local_process.address, "tcp": tcp_process.address}
    address = addresses[where]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.pool_work", method, address],
        env=environment(PYTHONWARNINGS="error,ignore::DeprecationWarning:multiprocessing"),
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_a_handle_pickles_with_its_settings(local_process: Served) -> None:
    with Engine("na+sm", client, config={"timeout": 7}) as engine:
        own = Client(engine)
        handle = own.make_target_handle(local_process.address, 1, read_only=True)
        handle.set_eager_read_threshold(10)
        for again in (
            pickle.loads(pickle.dumps(handle)),
            pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(handle)))),
            copy.copy(handle),
            copy.deepcopy(handle),
            copy.deepcopy([handle])[0],
        ):
            assert again
            assert again._link.eager_read == 10
            with pytest.raises(warabi.client.Exception, match="read-only"):
                again.create(1)
            assert again._engine is not None
            assert again._engine._state.connections.patience.silence == 7
            list(again.list())
        assert pickle.loads(pickle.dumps(own)).get_config() == own.get_config()
    assert not pickle.loads(pickle.dumps(TargetHandle()))
    _finalize_made()


def _finalize_made() -> None:
    from warabi import processes

    for engine in processes._engines._made.values():
        engine.finalize()


def test_secrets_are_in_no_pickle(tmp_path: Path) -> None:
    secret = "correct horse battery staple"
    path = tmp_path / "secret"
    path.touch(0o600)
    path.write_text(secret)
    with Engine("tcp", config={"token": secret}) as engine, Provider(engine, 1, MEMORY):
        handle = Client(engine).make_target_handle(str(engine.addr()), 1)
        with pytest.raises(TypeError, match="token_file"):
            pickle.dumps(handle)
        with Engine("tcp", client, config={"token_file": str(path)}) as other:
            handle = Client(other).make_target_handle(str(engine.addr()), 1)
            region = handle.create_and_write(b"data")
            pickled = pickle.dumps(handle)
            assert secret.encode() not in pickled
            script = "import pickle, sys; handle = pickle.loads(bytes.fromhex(sys.argv[1]));"
            script += "print([handle.read(region, 0, 4) for region in handle.list()])"
            done = run_python(script, pickled.hex())
            assert (done.returncode, done.stdout) == (0, "[b'data']\n"), done.stderr
            handle.erase(region)


def test_what_cannot_be_pickled_says_why() -> None:
    with serving(MEMORY) as (engine, provider, handle):
        request = handle.create_async(10)
        region = request.wait()
        for thing in (engine, provider, request):
            for make in (pickle.dumps, copy.copy, copy.deepcopy):
                with pytest.raises(TypeError, match="process") as caught:
                    make(thing)
                assert "\n" not in str(caught.value)
        again: Address = pickle.loads(pickle.dumps(engine.addr()))
        assert (str(again), again) == (str(engine.addr()), engine.addr())
        assert pickle.loads(pickle.dumps(region)) == region
        assert copy.deepcopy({region: handle.stat(region)}) == {region: handle.stat(region)}

        async def main() -> None:
            async with warabi.aio.connect(str(engine.addr()), 1) as target:
                with pytest.raises(TypeError, match="connect in the other process"):
                    pickle.dumps(target)

        trio.run(main)


# Other event loops


def test_asyncio_programs_get_an_error_with_advice() -> None:
    with serving(MEMORY) as (engine, _, handle):
        address = str(engine.addr())

        async def connect(function: Callable[..., Any]) -> None:
            async with function(address, 1):
                raise AssertionError

        for function in (warabi.aio.connect, warabi.reconnect.connect):
            with pytest.raises(RuntimeError, match=r"use warabi\.asyncio"):
                asyncio.run(connect(function))

        async def attach() -> None:
            refused = pytest.raises(RuntimeError, match=r"use warabi\.asyncio")
            with open_memory(MemoryConfig()) as target, refused:
                warabi.aio.attach(target)
            # What the sentence says:
            async with warabi.asyncio.connect(address, 1) as other:
                region = await other.create_and_write(b"data")
            assert handle.read(region, 0, 4) == b"data"

        asyncio.run(attach())

        async def awaits(request: AsyncRequest) -> None:
            await request

        with pytest.raises(TypeError, match=r"call wait\(\)"):
            asyncio.run(awaits(handle.create_async(10)))


def test_a_trio_task_can_await_requests() -> None:
    with serving(MEMORY) as (engine, _, _), Engine("na+sm", client) as other:
        handle = Client(other).make_target_handle(str(engine.addr()), 1)

        async def main() -> None:
            region = await handle.create_async(1 << 20)
            assert handle.size(region) == 1 << 20
            write = handle.write_async(region, 0, b"x" * (1 << 20))
            await write
            await write  # as often as one likes
            with pytest.raises(errors.OutOfBounds):
                await handle.write_async(region, 1 << 20, b"x")
            late = handle.persist_async(region, 0, 1 << 20)
            with trio.CancelScope() as scope:
                scope.cancel()
                await late
            assert scope.cancelled_caught
            late.wait()  # it has gone on

        trio.run(main)


def test_handles_and_providers_say_what_they_are() -> None:
    with serving(MEMORY) as (engine, provider, handle):
        address = str(engine.addr())
        assert repr(handle) == f"TargetHandle({address!r}, 1)"
        reader = Client(engine).make_target_handle(address, 1, read_only=True)
        assert repr(reader) == f"TargetHandle({address!r}, 1, read_only=True)"
        assert repr(TargetHandle()) == "TargetHandle()"
        assert repr(Client(engine)) == f"Client({engine!r})"
        uuid = handle.getxattr("/", "user.warabi.target").decode()
        assert repr(provider) == f"Provider({address!r}, 1, target {uuid})"
        provider.close()
        assert repr(provider).startswith(f"Provider({address!r}, 1, ")


def test_committed_names_survive_a_kill(tmp_path: Path, client_engine: Engine) -> None:
    config = file_config(tmp_path / "target")

    async def main(address: str) -> None:
        async with warabi.aio.connect(address, 1) as target:
            await target.mkdir("/by Trio")
            await target.commit()

    with provider_process("na+sm", config) as served:
        trio.run(main, served.address)
        target = Client(client_engine).make_target_handle(served.address, 1)
        target.makedirs("/a/b")
        target.commit()
        target.mkdir("/not committed")
        served.kill()
    with provider_process("na+sm", config) as served:
        target = Client(client_engine).make_target_handle(served.address, 1)
        assert sorted(target.listdir("/")) == ["a", "by Trio"]
        assert target.listdir("/a") == ["b"]
