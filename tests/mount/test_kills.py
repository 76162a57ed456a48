"""Programs that are killed, or get signals, while they wait for a provider."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mochi.margo
from mochi.warabi.client import Client
from tests.mount.support import (
    PROVIDER_ID,
    Mount,
    Provider,
    another_python,
    environment,
    fails_with,
    is_mounted,
    line_of,
    mounting,
    serving,
    wait_until,
    watchdog,
)

FOR_EVER = ("timeout=600", "reconnect=600")
"""Whoever is not killed waits longer than a test may."""

WAITERS = {
    "stat": "os.stat(path + '/file')",
    "open": "os.open(path + '/file', os.O_RDONLY)",
    "create": "os.open(path + '/new', os.O_RDWR | os.O_CREAT)",
    "read": "os.pread(file, 100, 5000)",
    "write": "os.pwrite(file, b'x', 5000)",
    "fsync": "os.fsync(file)",
    "list": "os.listdir(path + '/directory')",
    "mkdir": "os.mkdir(path + '/made')",
    "unlink": "os.unlink(path + '/removed')",
    "rename": "os.rename(path + '/moved', path + '/there')",
    "truncate": "os.truncate(path + '/file', 10)",
}

WAITER = """
import os, sys
path, work = sys.argv[1:]
file = os.open(path + "/held", os.O_RDWR)
print("ready", flush=True)
input()
print("begins", flush=True)
eval(work)
print("ended", flush=True)
"""


@pytest.fixture(params=["na+sm", "tcp"])
def provider(request: pytest.FixtureRequest) -> Iterator[Provider]:
    with serving(request.param) as found:
        try:
            yield found
        finally:
            found.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def mounted(provider: Provider, place: Path, *options: str) -> Iterator[Mount]:
    with (
        mounting(provider.address, place, f"provider_id={PROVIDER_ID}", *options) as mount,
        watchdog(mount, 45),
    ):
        yield mount


@contextlib.contextmanager
def stopped(provider: Provider) -> Iterator[None]:
    provider.process.send_signal(signal.SIGSTOP)
    tasks = Path(f"/proc/{provider.process.pid}/task")
    wait_until(lambda: all(state(task) == "T" for task in tasks.iterdir()), "the provider to stop")
    try:
        yield
    finally:
        provider.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def waiters(path: Path, works: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ready to do one thing each."""
    with contextlib.ExitStack() as stack:
        found = []
        for work in works:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", WAITER, path, work],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
                )
            )  # fmt: skip
            stack.callback(process.kill)
            found.append(process)
        for process in found:
            assert line_of(process) == "ready"
        yield found


def begin(process: subprocess.Popen[str]) -> bool:
    """Have it do its work, and return when it waits for that in the kernel; whether it does, and
    has not ended without: shared memory and the page cache need no provider."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(file=process.stdin, flush=True)
    assert line_of(process) == "begins"
    fd = process.stdout.fileno()
    ended = select.poll()
    ended.register(fd, select.POLLIN)
    wait_until(lambda: ended.poll(0) or waits(process.pid), "a request")
    return not ended.poll(0)


def state(process: Path) -> str:
    return (process / "stat").read_text().rpartition(")")[2].split()[0]


def waits(pid: int) -> bool:
    """Whether a process waits in the kernel for an answer, or for one that waits for an answer."""
    with contextlib.suppress(OSError):
        process = Path(f"/proc/{pid}")
        return state(process) == "D" or "request_wait_answer" in (process / "stack").read_text()
    return False


def regions(target: Any) -> list[Any]:
    return list(target.list())


def make_files(path: Path) -> None:
    (path / "directory").mkdir()
    for name in ("file", "held", "removed", "moved"):
        (path / name).write_bytes(name.encode() * 1000)


def test_a_program_that_waits_for_a_silent_provider_can_be_killed(
    provider: Provider, place: Path
) -> None:
    with mounted(provider, place, *FOR_EVER) as mount:
        make_files(mount.path)
        with waiters(mount.path, list(WAITERS.values())) as processes:
            with stopped(provider):
                for process in processes:
                    begin(process)
                for process in processes:
                    process.kill()
                ends = [process.wait(30) for process in processes]
                # Shared memory and the page cache need no provider.
                assert set(ends) <= {0, -signal.SIGKILL}
                assert ends.count(0) < len(ends) / 2
            assert (mount.path / "held").read_bytes()[:4] == b"held"
        # What they had opened, made or removed in vain is not held any more.
        for name in ("file", "held", "removed", "moved", "there", "new"):
            (mount.path / name).unlink(missing_ok=True)
        with mochi.margo.Engine("na+sm", mochi.margo.client) as engine:
            target = Client(engine).make_target_handle(provider.address, PROVIDER_ID)
            wait_until(lambda: not regions(target), "regions to be erased")


@pytest.mark.parametrize("provider", ["tcp"], indirect=True)
def test_a_killed_write_does_not_come_after_later_ones(provider: Provider, place: Path) -> None:
    """Neither one that waits for an answer, nor one that waits for a connection."""
    with mounted(provider, place, *FOR_EVER, "direct_io") as mount:
        make_files(mount.path)
        path = mount.path / "held"
        for number in range(5):
            old = f"os.pwrite(file, b'old' * 1000, {number})"
            with waiters(mount.path, [old]) as (process,), stopped(provider):
                assert begin(process)
                process.kill()
                assert process.wait(30) == -signal.SIGKILL
            with path.open("r+b", buffering=0) as file:
                file.write(b"new" * 2000)
            assert path.read_bytes()[:3003] == (b"new" * 2000)[:3003]


SIGNALLED = """
import ctypes, os, signal, sys
count = 0
def handle(*_):
    global count
    count += 1
signal.signal(signal.SIGALRM, handle)
signal.siginterrupt(signal.SIGALRM, True)
libc = ctypes.CDLL(None, use_errno=True)
file = os.open(sys.argv[1], os.O_RDWR)
buffer = ctypes.create_string_buffer(100)
signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
print("begins", flush=True)
for call in (
    lambda: libc.pread(file, buffer, 100, 5000), lambda: libc.pwrite(file, b"x", 1, 5000),
    lambda: libc.fsync(file),
):
    result = call()
    print(result, ctypes.get_errno() if result < 0 else 0, flush=True)
    input()
print(count > 0, flush=True)
"""


@pytest.mark.parametrize("provider", ["tcp"], indirect=True)
def test_signals_with_handlers_do_not_end_what_waits(provider: Provider, place: Path) -> None:
    with mounted(provider, place, *FOR_EVER) as mount:
        path = mount.path / "file"
        path.write_bytes(b"x" * 10_000)
        provider.process.send_signal(signal.SIGSTOP)
        with subprocess.Popen(
            [sys.executable, "-c", SIGNALLED, path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
        ) as process:  # fmt: skip
            assert process.stdin is not None
            try:
                provider.process.send_signal(signal.SIGCONT)
                assert line_of(process) == "begins"
                for wanted in ("100 0", "1 0", "0 0"):
                    assert line_of(process) == wanted
                    provider.process.send_signal(signal.SIGSTOP)
                    print(file=process.stdin, flush=True)
                    if wanted != "0 0":
                        wait_until(lambda: waits(process.pid), "a request")
                        time.sleep(0.2)  # some signals come
                    provider.process.send_signal(signal.SIGCONT)
                assert line_of(process) == "True"
                process.wait(30)
            finally:
                process.kill()


@pytest.mark.parametrize("provider", ["tcp"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_a_signal_that_kills_may_follow_one_that_does_not(
    provider: Provider, place: Path, number: signal.Signals
) -> None:
    with mounted(provider, place, *FOR_EVER) as mount:
        (mount.path / "held").write_bytes(b"data")
        work = (
            "(__import__('signal').signal(2, __import__('signal').SIG_DFL),"
            " __import__('signal').signal(10, lambda *_: None), os.stat(path + '/held'))"
        )
        with waiters(mount.path, [work]) as (process,), stopped(provider):
            assert begin(process)
            process.send_signal(signal.SIGUSR1)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
            process.send_signal(number)
            assert process.wait(30) == -number


MANY_THREADS = """
import os, sys, threading
path, count = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
input()
threading.stack_size(1 << 16)
for number in range(count):
    threading.Thread(target=os.path.exists, args=(f"{path}/{number}",)).start()
print("begun", flush=True)
"""


@pytest.mark.parametrize("provider", ["tcp"], indirect=True)
def test_a_program_whose_many_threads_all_wait_can_be_killed(
    provider: Provider, place: Path
) -> None:
    with (
        mounted(provider, place, *FOR_EVER) as mount,
        another_python(MANY_THREADS, mount.path, "1500") as process,
    ):
        assert line_of(process) == "ready"
        with stopped(provider):
            print(file=process.stdin, flush=True)
            assert line_of(process) == "begun"
            tasks = Path(f"/proc/{process.pid}/task")
            wait_until(
                lambda: sum(waits(int(task.name)) for task in tasks.iterdir()) >= 1500, "requests"
            )
            process.kill()
            assert process.wait(30) == -signal.SIGKILL
        assert os.listdir(mount.path) == []


LOST_SYNC = """
from warabi.provider.session import ClientSession
_operate, left = ClientSession._operate, ["sync"]
async def operate(self, request):
    if request.name in left:
        left.clear()
    else:
        await _operate(self, request)
ClientSession._operate = operate
"""


def test_a_lost_reply_to_the_last_sync_is_made_up_for(place: Path) -> None:
    with (
        serving("tcp", before=LOST_SYNC) as provider,
        mounted(provider, place, "timeout=1") as mount,
    ):
        (mount.path / "file").write_bytes(b"data")
        mount.unmount()
        assert "ERROR" not in mount.new_log()


UNANSWERED = """
import os, trio
from warabi.provider.session import ClientSession
_operate, _reply = ClientSession._operate, ClientSession._reply
async def operate(self, request):
    if request.name in ("mkdir", "mknod", "symlink", "link", "unlink", "rename"):
        if os.path.exists({path!r}):
            self._reply = reply.__get__(self)
    try:
        await _operate(self, request)
    finally:
        self.__dict__.pop("_reply", None)
async def reply(self, *arguments):
    if {late}:
        while os.path.exists({path!r}):
            await trio.sleep(0.02)
        await _reply(self, *arguments)
ClientSession._operate = operate
"""
"""A provider that does what it is asked for, and does not say so, or says it late."""


@pytest.mark.parametrize(
    ("believing", "killed"),
    [("entry_timeout=600,negative_timeout=600", True), ("exclusive", False)],
)
def test_what_took_effect_without_an_answer_is_seen(
    place: Path, believing: str, killed: bool
) -> None:
    """Though the kernel was to believe what it knew of these names for long."""
    switch = place / "unanswered"
    timeout = "timeout=600" if killed else "timeout=1"
    with (
        serving("tcp", before=UNANSWERED.format(path=str(switch), late=killed)) as provider,
        mounted(provider, place, believing, timeout) as mount,
    ):
        make_files(mount.path)
        works = [
            "os.mkdir(path + '/made')", "os.rename(path + '/moved', path + '/there')",
            "os.mknod(path + '/new')", "os.unlink(path + '/removed')",
            "os.link(path + '/file', path + '/linked')", "os.symlink('file', path + '/symbolic')",
        ]  # fmt: skip
        present = ("made", "there", "new", "linked", "symbolic")
        for name in present:
            assert not (mount.path / name).exists()
        for work in works if killed else works[:2]:
            with waiters(mount.path, [work]) as (process,):
                switch.touch()
                assert begin(process)
                if killed:
                    time.sleep(0.1)
                    process.kill()
                process.wait(30)
                switch.unlink()
        for name in present if killed else present[:2]:
            wait_until((mount.path / name).exists, name)
        assert not (mount.path / "moved").exists()
        assert (mount.path / "removed").exists() != killed


LOST = """
from warabi.provider.session import ClientSession
_operate = ClientSession._operate
async def operate(self, request):
    if request.name not in ("mkdir", "readlink"):
        await _operate(self, request)
ClientSession._operate = operate
"""
"""A provider that answers everything else, and says that it lives."""

WEDGED = """
import trio
from warabi.in_process import async_ops as dispatch
_execute = dispatch.execute
async def execute(target, name, *arguments, **options):
    if name in ("mkdir", "readlink"):
        await trio.sleep_forever()
    return await _execute(target, name, *arguments, **options)
dispatch.execute = execute
"""
"""A provider that answers nothing more on a connection that asks for these."""


@pytest.mark.parametrize(("transport", "defect"), [("na+sm", LOST), ("tcp", WEDGED)])
def test_a_request_that_is_never_answered_ends_at_its_time(
    transport: str, defect: str, place: Path
) -> None:
    with (
        serving(transport, before=defect) as provider,
        mounted(provider, place, "timeout=1", "reconnect=0.5") as mount,
    ):
        path = mount.path
        (path / "link").symlink_to("target")
        (path / "held").write_bytes(b"")
        works: list[Callable[[], object]] = [(path / "directory").mkdir]
        if defect is LOST:
            works.append((path / "link").readlink)
        for work in works:
            with fails_with(errno.ETIMEDOUT, errno.ENOTCONN):
                work()
            assert sorted(os.listdir(path)) == ["held", "link"]
        with waiters(path, ["os.mkdir(path + '/other')"]) as (process,):
            assert begin(process)
            mount.signal(signal.SIGTERM)
            mount.wait()
            assert not is_mounted(path)
            assert process.wait(30)
