"""Reconnecting targets: which calls wait, which are repeated, and which errors are raised."""

from __future__ import annotations

import contextlib
import errno
import signal
import socket
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from click.testing import CliRunner

from tests.support.helpers import MEMORY, PATIENCE, Served, file_config, provider_process
from tests.support.relay import Relay, relay
from warabi import aio, errors, reconnect
from warabi._core.attributes import ROOT
from warabi._core.caller import CALLER, Caller
from warabi.client import Client
from warabi.engine import Engine
from warabi.provider.session import ClientSession
from warabi.region import RegionID
from warabi.server import Provider
from warabi.tools.cli.main import main

REG = stat.S_IFREG | 0o644


@pytest.fixture
def port() -> int:
    """Of loopback, free."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        number: int = server.getsockname()[1]
        return number


@contextlib.contextmanager
def served(place: Path, port: int = 0) -> Iterator[Served]:
    """Files in *place*, at the same address each time if *port* is the same."""
    with provider_process(f"tcp://127.0.0.1:{port}", file_config(place / "target")) as process:
        yield process


@pytest.fixture
def relayed(tmp_path: Path) -> Iterator[Relay]:
    with served(tmp_path) as process, relay(process.address) as found:
        yield found


def end(process: Served) -> None:
    process.signal(signal.SIGTERM)
    assert process.process.wait(PATIENCE) == 0


# Waiting


async def test_calls_wait_for_a_provider_that_comes_back(tmp_path: Path, port: int) -> None:
    with served(tmp_path, port) as first:
        async with reconnect.connect(first.address, 1) as target:
            region = await target.create_and_write(b"before", persist=True)
            end(first)
            read: list[bytes] = []
            done = trio.Event()

            async def read_it() -> None:
                read.append(await target.read(region, 0, 6))
                done.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_it)
                await trio.sleep(0.2)
                assert not read
                with served(tmp_path, port):
                    with trio.fail_after(PATIENCE):
                        await done.wait()
                    await target.write(region, 0, b"after ", persist=True)
                    assert await target.read(region, 0, 6) == b"after "
            assert read == [b"before"]


async def test_calls_fail_when_the_outage_outlasts_their_patience_and_work_again_after_it(
    tmp_path: Path, port: int
) -> None:
    with served(tmp_path, port) as first:
        async with reconnect.connect(first.address, 1, patience=0.3) as target:
            region = await target.create_and_write(b"data", persist=True)
            first.kill()
            with pytest.raises((errors.ConnectionLost, errors.ConnectionFailed)):
                await target.size(region)
            with trio.fail_after(30):
                for _ in range(200):  # which do not wait: it has lasted long enough already
                    with pytest.raises((errors.ConnectionLost, errors.ConnectionFailed)):
                        await target.size(region)
            with served(tmp_path, port), trio.fail_after(PATIENCE):
                while True:
                    try:
                        assert await target.size(region) == 4
                        break
                    except (errors.ConnectionLost, errors.ConnectionFailed):
                        await trio.sleep(0.05)


async def test_an_append_whose_answer_was_lost_is_not_repeated(relayed: Relay) -> None:
    """Neither doubled nor unnoticed: who called is told, and finds it once or not at all."""
    async with reconnect.connect(relayed.address, 1) as target:
        region = await target.create_and_write(b"-")
        size = 1
        for number in range(30):
            data = b"%04d" % number * (1 + number % 2 * 1000)
            with trio.fail_after(PATIENCE):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_cut_soon, relayed, number)
                    lost = False
                    try:
                        assert await target.append(region, data) == size
                    except errors.ConnectionLost:
                        lost = True
                found = await target.size(region)
            assert found in ({size, size + len(data)} if lost else {size + len(data)})
            assert await target.read(region, size, found - size) in (b"", data)
            size = found


async def _cut_soon(relayed: Relay, number: int) -> None:
    await trio.sleep(number % 10 * 0.0005)
    relayed.cut()


async def test_a_silent_provider_is_an_outage_too(tmp_path: Path) -> None:
    """As after a suspension of the machine: the socket is there, and nothing comes."""
    with served(tmp_path) as process:
        async with reconnect.connect(process.address, 1, timeout=2.0, patience=1.0) as target:
            region = await target.create(3)
            process.stop()
            with pytest.raises((errors.TimedOut, errors.ConnectionLost)):
                await target.size(region)
            process.signal(signal.SIGCONT)
            with trio.fail_after(PATIENCE):
                while True:
                    try:
                        assert await target.size(region) == 3
                        break
                    except (errors.TimedOut, errors.ConnectionLost, errors.ConnectionFailed):
                        await trio.sleep(0.05)


async def test_the_first_connection_is_not_waited_for(port: int) -> None:
    with trio.fail_after(PATIENCE), pytest.raises(errors.ConnectionFailed):
        async with reconnect.connect(f"tcp://127.0.0.1:{port}", 1):
            raise AssertionError
    with provider_process("tcp", MEMORY) as process, pytest.raises(errors.ProviderNotFound):
        async with reconnect.connect(process.address, 9):
            raise AssertionError


async def test_exceptions_of_the_block_are_passed_on_unchanged(tmp_path: Path) -> None:
    with served(tmp_path) as process, pytest.raises(KeyError, match="mine"):
        async with reconnect.connect(process.address, 1):
            raise KeyError("mine")


async def test_another_target_at_the_address_is_not_taken_for_the_first(port: int) -> None:
    with provider_process(f"tcp://127.0.0.1:{port}", MEMORY) as first:
        async with reconnect.connect(first.address, 1, patience=1.0) as target:
            region = await target.create(1)
            first.kill()
            with (
                provider_process(f"tcp://127.0.0.1:{port}", MEMORY),
                pytest.raises(errors.ConnectionFailed, match="a different target"),
            ):
                await target.size(region)


# Repeating


async def test_idempotent_calls_are_repeated_after_a_lost_reply(relayed: Relay) -> None:
    async with reconnect.connect(relayed.address, 1) as target:
        region = await target.create(100_000)
        data = bytes(range(250)) * 400
        made = await target.call("mknod", ROOT, b"file", REG, 0, 0, 0, False, 0)

        async def reads() -> bytes:
            buffer = bytearray(100_000)
            await target.read_into(region, 0, buffer)
            return bytes(buffer)

        for work, wanted in (
            (lambda: target.write(region, 0, data), None),
            (reads, data),
            (lambda: target.size(region), 100_000),
            (lambda: target.resize(region, 100_001), None),
            (lambda: target.persist(region, 0, 10), None),
            (lambda: target.call("lookup", ROOT, b"file"), made),
        ):
            before = relayed.connections
            relayed.swallow = True
            with trio.fail_after(PATIENCE):
                assert await work() == wanted
            assert relayed.connections == before + 1


async def test_calls_that_are_not_idempotent_are_not_repeated(relayed: Relay) -> None:
    async with reconnect.connect(relayed.address, 1) as target:
        for name, arguments in (
            ("create", (1,)),
            ("mkdir", (ROOT, b"directory", 0o755, 0, 0, 0)),
            ("rename", (ROOT, b"directory", ROOT, b"moved", 0, True)),
            ("rmdir", (ROOT, b"moved", False)),
        ):
            await target.call("room")  # is connected
            relayed.swallow = True
            with trio.fail_after(PATIENCE), pytest.raises(errors.ConnectionLost):
                await target.call(name, *arguments)
        regions = [region async for region in target.list()]
        assert len(regions) == 1  # the lost answers were to calls that took effect, once
        with pytest.raises(errors.PathError) as caught:
            await target.call("lookup", ROOT, b"moved")
        assert caught.value.errno == errno.ENOENT


async def test_calls_started_during_an_outage_complete_after_it(relayed: Relay) -> None:
    async with reconnect.connect(relayed.address, 1) as target:
        engine, relayed.engine = relayed.engine, "tcp://127.0.0.1:1"
        relayed.cut()
        await trio.sleep(0.1)

        async def later() -> None:
            await trio.sleep(0.2)
            relayed.engine = engine

        async with trio.open_nursery() as nursery:
            nursery.start_soon(later)
            with trio.fail_after(PATIENCE):
                await target.call("mkdir", ROOT, b"directory", 0o755, 0, 0, 0)
        found = await target.call("lookup", ROOT, b"directory")
        assert stat.S_ISDIR(found.mode)


# Pins


async def test_open_files_are_pinned_again(relayed: Relay) -> None:
    async with (
        reconnect.connect(relayed.address, 1) as target,
        aio.connect(relayed.engine, 1) as other,
    ):
        made = await target.call("mknod", ROOT, b"file", REG, 0, 0, 0, True, 0)
        await target.call("pin", made.ino)
        await target.write(made.region, 0, b"data", extend=True)
        relayed.cut()
        assert await target.size(made.region) == 4  # is connected again
        await other.call("unlink", ROOT, b"file", False)
        assert await target.read(made.region, 0, 4) == b"data"
        await target.call("unpin", made.ino, 1)
        assert await target.read(made.region, 0, 4) == b"data"
        await target.call("unpin", made.ino, 1)
        with pytest.raises(errors.InvalidRegion):
            await target.read(made.region, 0, 4)


async def test_an_open_file_without_a_name_ends_with_the_connection(relayed: Relay) -> None:
    async with (
        reconnect.connect(relayed.address, 1) as target,
        aio.connect(relayed.engine, 1) as other,
    ):
        made = await target.call("mknod", ROOT, b"file", REG, 0, 0, 0, True, 0)
        await target.call("unlink", ROOT, b"file", False)
        assert await other.size(made.region) == 0
        engine, relayed.engine = relayed.engine, ""  # or the next connection could be there first
        relayed.cut()
        with trio.fail_after(PATIENCE), pytest.raises(errors.InvalidRegion):
            while True:
                await other.size(made.region)
        relayed.engine = engine
        with pytest.raises(errors.InvalidRegion):
            await target.size(made.region)
        await target.call("unpin", made.ino, 1)  # as the kernel's release of it does
        assert await target.call("getattr", ROOT)


async def test_a_pin_that_is_given_back_in_vain_is_not_taken_again(relayed: Relay) -> None:
    async with (
        reconnect.connect(relayed.address, 1, patience=0.2) as target,
        aio.connect(relayed.engine, 1) as other,
    ):
        made = await target.call("mknod", ROOT, b"file", REG, 0, 0, 0, True, 0)
        engine, relayed.engine = relayed.engine, ""
        relayed.cut()
        with pytest.raises((errors.ConnectionLost, errors.ConnectionFailed)):
            await target.call("unpin", made.ino, 1)
        relayed.engine = engine
        with trio.fail_after(PATIENCE):
            while True:
                with contextlib.suppress(errors.ConnectionLost, errors.ConnectionFailed):
                    await target.call("getattr", made.ino)
                    break
        await other.call("unlink", ROOT, b"file", False)
        with pytest.raises(errors.InvalidRegion):
            await other.size(made.region)


# Replies that never come while others do


@contextlib.contextmanager
def losing(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[tuple[str, list[str]]]:
    """A provider without replies to the operations *names*; its address, and these, which may be
    changed."""
    lost = list(names)
    watch, operate = ClientSession._watch, ClientSession._operate

    async def lost_watch(self: ClientSession, number: int, *arguments: Any) -> None:
        await watch(self, number + 1_000_000 * ("watch" in lost), *arguments)

    async def lost_operate(self: ClientSession, request: Any) -> None:
        if request.name not in lost:
            await operate(self, request)

    monkeypatch.setattr(ClientSession, "_watch", lost_watch)
    monkeypatch.setattr(ClientSession, "_operate", lost_operate)
    with Engine("tcp") as engine, Provider(engine, 1, MEMORY):
        yield str(engine.addr()), lost


async def test_a_lost_reply_to_a_watch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with losing(monkeypatch) as (address, lost):
        async with (
            reconnect.connect(address, 1, timeout=1.0) as target,
            aio.connect(address, 1) as other,
            aclosing(target.changes()) as changes,
        ):
            with trio.fail_after(PATIENCE):
                await anext(changes)  # that everything may have changed
                lost.append("watch")
                async with trio.open_nursery() as nursery:

                    @nursery.start_soon
                    async def change() -> None:
                        await trio.sleep(0.1)  # it is asked
                        await other.call("mkdir", ROOT, b"directory", 0o755, 0, 0, 0)
                        await trio.sleep(0.2)  # that is answered
                        lost.clear()

                    assert (await anext(changes)).everything


async def test_waiting_for_others_that_get_no_reply_is_a_part_of_a_requests_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with losing(monkeypatch, "commit") as (address, _):
        async with (
            reconnect.connect(address, 1, timeout=0.5) as target,
            trio.open_nursery() as nursery,
        ):
            region = await target.create(1)
            scopes: list[trio.CancelScope] = []
            ended = 0

            async def commit() -> None:
                nonlocal ended
                with trio.CancelScope() as scope, contextlib.suppress(errors.TimedOut):
                    scopes.append(scope)
                    await target.call("commit")
                ended += 1

            async def resize(caller: Caller) -> None:
                CALLER.set(caller)
                with pytest.raises(errors.TimedOut, match="its caller was cancelled"):
                    await target.resize(region, 2)
                assert await target.size(region) == 1

            for _ in range(64):
                nursery.start_soon(commit)
            await trio.testing.wait_all_tasks_blocked(0.01)
            with trio.fail_after(PATIENCE):
                with pytest.raises(errors.TimedOut, match="not sent"):
                    await target.call("getattr", ROOT)
                assert ended == 0
                async with trio.open_nursery() as inner:
                    caller = Caller()
                    inner.start_soon(resize, caller)
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    caller.gone = True  # what would change something is not sent any more
                    for scope in scopes:
                        scope.cancel()


# Syncing


@contextlib.asynccontextmanager
async def _restarted(
    place: Path, port: int, how: signal.Signals
) -> AsyncIterator[tuple[aio.Target, RegionID, RegionID]]:
    """A target with a file that was written and not synced, whose provider was ended *how*."""
    with served(place, port) as first:
        async with reconnect.connect(first.address, 1) as target:
            made = await target.call("mknod", ROOT, b"file", REG, 0, 0, 0, False, 0)
            await target.write(made.region, 0, b"synced", extend=True)
            await target.fsync(made.region)
            quiet = await target.create_and_write(b"synced too")
            await target.fsync(quiet)
            await target.write(made.region, 0, b"not   ")
            first.signal(how)
            first.process.wait(PATIENCE)
            with served(place, port):
                yield target, made.region, quiet


async def test_a_sync_tells_that_what_was_written_may_be_lost(tmp_path: Path, port: int) -> None:
    async with _restarted(tmp_path, port, signal.SIGKILL) as (target, region, quiet):
        await target.fsync(quiet)  # had nothing to lose
        with pytest.raises(errors.StorageError, match="may be lost"):
            await target.fsync(region)
        await target.write(region, 0, b"again ")
        await target.fsync(region)  # tells once, of what was written before
        await target.call("sync")


async def test_a_provider_that_ended_in_order_lost_nothing(tmp_path: Path, port: int) -> None:
    async with _restarted(tmp_path, port, signal.SIGTERM) as (target, region, quiet):
        await target.fsync(quiet)
        await target.fsync(region)
        assert await target.read(region, 0, 6) == b"not   "
        await target.call("sync")


async def test_a_lost_connection_alone_loses_nothing(relayed: Relay) -> None:
    async with reconnect.connect(relayed.address, 1) as target:
        region = await target.create_and_write(b"data")
        await target.call("mkdir", ROOT, b"directory", 0o755, 0, 0, 0)
        relayed.cut()
        await target.fsync(region)
        await target.call("commit")


async def test_a_commit_and_a_sync_tell_of_names_too(tmp_path: Path, port: int) -> None:
    for name in ("commit", "sync"):
        with served(tmp_path / name, port) as first:
            async with reconnect.connect(first.address, 1) as target:
                await target.call("mkdir", ROOT, b"synced", 0o755, 0, 0, 0)
                await target.call("commit")
                await target.call("mkdir", ROOT, b"not", 0o755, 0, 0, 0)
                first.kill()
                with served(tmp_path / name, port):
                    with pytest.raises(errors.StorageError, match="may be lost"):
                        await target.call(name)
                    await target.call(name)
                    assert await target.call("lookup", ROOT, b"synced")


def test_the_epoch_of_a_target_changes_when_it_was_not_closed(tmp_path: Path, port: int) -> None:
    def epoch(how: signal.Signals) -> str:
        with served(tmp_path, port) as process, Engine("tcp") as engine:
            target = Client(engine).make_target_handle(process.address, 1)
            found: str = target._link.call("epoch")
            process.signal(how)
            process.process.wait(PATIENCE)
        return found

    first = epoch(signal.SIGTERM)
    second = epoch(signal.SIGKILL)
    third = epoch(signal.SIGTERM)
    assert first == second != third
    assert epoch(signal.SIGKILL) == third
    done = CliRunner().invoke(main, ["fsck", "--repair", str(tmp_path / "target")])
    assert done.exit_code in (0, 1), done.output
    assert epoch(signal.SIGTERM) != third  # mended, but not what it was


# The blocking client


def test_a_handle_survives_a_restart_of_its_provider(tmp_path: Path, port: int) -> None:
    with Engine("tcp") as engine:
        with served(tmp_path, port) as first:
            target = Client(engine).make_target_handle(first.address, 1)
            region = target.create_and_write(b"data", persist=True)
            first.kill()
            for _ in range(2):
                with pytest.raises(errors.Exception) as caught:
                    target.read(region, 0, 4)
                assert isinstance(caught.value, errors.ConnectionLost | errors.ConnectionFailed)
        with served(tmp_path, port):
            assert target.read(region, 0, 4) == b"data"
            assert target.create(1) != RegionID()
