"""The ``warabi`` command, as a process of its own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

from tests.support.helpers import (
    MEMORY,
    PATIENCE,
    RawPeer,
    environment,
    eventually,
    file_config,
    pattern,
    raw_connection,
    run_python,
)
from warabi import errors
from warabi._core.tuning import STALL_PATIENCE
from warabi.client import Client, RegionID, TargetHandle
from warabi.engine import Engine, client

COMMAND = [sys.executable, "-c", "from warabi.tools.cli.main import main; main()"]


def run(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin, capture_output=True, env=environment(), timeout=PATIENCE, check=False,
    )  # fmt: skip


def on_terminal(columns: int, *arguments: str | Path, command: Sequence[str] = COMMAND) -> bytes:
    """All that a command, which succeeds, writes to a terminal of that width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with (
        os.fdopen(ours, "rb", buffering=0) as terminal,
        subprocess.Popen(
            [*command, *map(str, arguments)], stdin=theirs, stdout=theirs, stderr=theirs,
            env=environment(TERM="xterm"),
        ) as process,
    ):  # fmt: skip
        os.close(theirs)
        timer = threading.Timer(PATIENCE, process.kill)
        timer.start()
        shown = b""
        try:
            with contextlib.suppress(OSError):  # EIO: the other end is closed
                while piece := terminal.read(4096):
                    shown += piece
        finally:
            timer.cancel()
            timer.join()
        assert process.wait(PATIENCE) == 0, shown
    return shown


def ok(*arguments: str | Path, stdin: bytes = b"") -> bytes:
    done = run(*arguments, stdin=stdin)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


def fails(*arguments: str | Path, stdin: bytes = b"") -> str:
    """Standard error, of one line, of a command that exits with 1."""
    done = run(*arguments, stdin=stdin)
    text = done.stderr.decode()
    assert (done.returncode, done.stdout) == (1, b""), text
    assert text.startswith("warabi: ")
    assert text.count("\n") == 1
    return text


class Service:
    """A ``warabi serve`` process."""

    def __init__(self, *arguments: str | Path, **extra: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "serve", *map(str, arguments)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment(**extra),
        )  # fmt: skip

    @property
    def address(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self, number: signal.Signals = signal.SIGTERM) -> str:
        """End it in order; what it wrote on standard error."""
        self.process.send_signal(number)
        text = self.process.communicate(timeout=PATIENCE)[1]
        assert self.process.returncode == 0, text
        return text


@contextlib.contextmanager
def serving(*arguments: str | Path, **extra: str) -> Iterator[Service]:
    service = Service(*arguments, **extra)
    try:
        yield service
    finally:
        service.process.kill()
        service.process.communicate()


def handle(engine: Engine, address: str, provider_id: int = 0) -> TargetHandle:
    return Client(engine).make_target_handle(address, provider_id)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration of two providers, 1 in memory and 2 in files."""
    path = tmp_path / "service.json"
    providers = [
        {"name": "a", "type": "warabi", "provider_id": 1, "config": MEMORY},
        {"name": "b", "type": "warabi", "provider_id": 2, "config": file_config(tmp_path / "b")},
    ]
    path.write_text(json.dumps({"providers": providers}))
    return path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_a_configuration(
    config: Path, client_engine: Engine, number: signal.Signals, runtime_directory: Path
) -> None:
    with serving(config) as service:
        address = service.address
        assert address.startswith("na+sm://")
        for provider_id in (1, 2):
            target = handle(client_engine, address, provider_id)
            region = target.create_and_write(b"data")
            assert target.read(region, 0, 4) == b"data"
        assert service.end(number) == ""
    assert not list(runtime_directory.glob(f"{service.process.pid}-*"))
    with serving("-a", "ofi+tcp", config) as service:  # what was written is there, persisted or not
        address = service.address
        assert address.startswith("ofi+tcp://127.0.0.1:")
        assert handle(client_engine, address, 2).read(region, 0, 4) == b"data"
        service.end()


def test_serve_what_the_environment_says(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "address"
    variables = {"WARABI_SERVE_CONFIG": str(config), "WARABI_SERVE_ADDRESS_FILE": str(path)}
    with serving("-a", "tcp", WARABI_SERVE_ADDRESS="na+sm", **variables) as service:
        assert service.address.startswith("tcp://")
        assert path.read_text().startswith("tcp://")
        service.end()


def test_check_a_configuration(config: Path, tmp_path: Path) -> None:
    assert ok("config", "check", config) == b""
    assert not (tmp_path / "b").exists()
    toml = tmp_path / "service.toml"
    toml.write_text('libraries = ["x.so"]\n[margo]\ntimeout = 5\n')
    assert ok("config", "check", toml) == b"$.libraries is accepted but has no effect\n"
    toml.write_text("[margo]\ntimout = 5\n")
    assert "$.margo.timout: unknown key, did you mean timeout?" in fails("config", "check", toml)
    assert json.loads(ok("config", "schema"))["properties"]["margo"]


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_serve_one_target(kind: str, tmp_path: Path, client_engine: Engine) -> None:
    target = "memory:" if kind == "memory" else f"file:{tmp_path}/made/target"
    with serving("--target", target) as service:
        handle(client_engine, service.address).create(1)
        service.end()
    with serving("--target", target, "-p", "9") as service:
        regions = list(handle(client_engine, service.address, 9).list())
        assert len(regions) == (0 if kind == "memory" else 1)
        service.end()


def test_address_file(tmp_path: Path, client_engine: Engine) -> None:
    path = tmp_path / "address"
    path.write_text("of a service that was killed\n")
    with serving("-t", "memory:", "--address-file", path) as service:
        address = service.address
        assert path.read_text() == f"{address}\n"
        service.end()
    assert not list(tmp_path.iterdir())
    with serving("-t", "memory:", "--address-file", path) as service:
        assert service.address
        path.write_text("of another service\n")
        service.end()
    assert path.read_text() == "of another service\n"


def test_address_file_is_never_seen_half_written(tmp_path: Path) -> None:
    path = tmp_path / "address"
    seen: set[str] = set()
    with serving("-t", "memory:", "--address-file", path) as service:
        while not seen:
            with contextlib.suppress(FileNotFoundError):
                seen.add(path.read_text())
        assert seen == {f"{service.address}\n"}
        service.end()


def test_address_file_that_cannot_be_written(tmp_path: Path) -> None:
    wrong = tmp_path / "missing" / "address"
    assert "missing" in fails("serve", "-t", "memory:", "--address-file", wrong)


def test_keys_without_effect_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "service.json"
    path.write_text('{"libraries": ["libwarabi-bedrock-module.so"], "margo": {"argobots": {}}}')
    with serving(path) as service:
        assert service.address
        lines = service.end().splitlines()
    assert len(lines) == 2
    assert all(line.startswith("warabi: configuration: $.") for line in lines)


WRONG: dict[str, tuple[list[str], str]] = {
    "no file": (["missing.json"], "missing.json: No such file"),
    "a directory": (["."], "Is a directory"),
    "target": (["-t", "swift:pool"], "expected memory: or file:PATH or rados:POOL/NAME"),
    "file target without a path": (["-t", "file:"], "expected memory: or file:PATH"),
    "pool without a target": (["-t", "rados:pool"], "expected rados:POOL/NAME"),
    "address": (["-t", "memory:", "-a", "pigeon"], "unknown transport 'pigeon'"),
    "beyond loopback": (["-t", "memory:", "-a", "tcp://0.0.0.0"], "is not a loopback address"),
    "provider ID": (["-t", "memory:", "-p", "65536"], "provider_id"),
    "target in the way": (["-t", "file:other"], "not a warabi target"),
}


@pytest.mark.parametrize("name", WRONG)
def test_serve_what_cannot_be_served(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").write_text("something else")
    arguments, message = WRONG[name]
    assert message in fails("serve", *arguments)


def test_serve_a_wrong_configuration() -> None:
    assert "not valid JSON" in fails("serve", "/dev/stdin", stdin=b"{")
    text = fails("serve", "/dev/stdin", stdin=b'{"providers": [{"type": "yokan"}]}')
    assert "$.providers[0].type: 'yokan' is not served here" in text


@pytest.mark.parametrize(
    "arguments",
    [[], ["service.json", "-t", "memory:"], ["service.json", "-p", "1"], ["--what"], ["a", "b"]],
)
def test_serve_wrong_command_lines(arguments: list[str]) -> None:
    done = run("serve", *arguments)
    assert done.returncode == 2
    assert done.stdout == b""
    assert b"Error: " in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_target_that_is_served_already(tmp_path: Path) -> None:
    target = f"file:{tmp_path}/target"
    with serving("-t", target) as service:
        assert service.address
        assert f"already open in process {service.process.pid}" in fails("serve", "-t", target)
        service.end()


# Service managers


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_readiness_is_reported_to_the_service_manager(
    kind: str, tmp_path: Path, client_engine: Engine
) -> None:
    path = str(tmp_path / "notify") if kind == "path" else f"@warabi-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path.replace("@", "\0", 1))
        manager.settimeout(PATIENCE)
        with serving("-t", "memory:", NOTIFY_SOCKET=path) as service:
            assert manager.recv(100) == b"READY=1"
            handle(client_engine, service.address).create(1)
            assert service.end() == ""
            assert manager.recv(100) == b"STOPPING=1"
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(100)


@pytest.mark.parametrize(
    "send",
    [
        "os.kill(os.getpid(), signal.SIGTERM)",
        "signal.pthread_kill(threading.get_ident(), signal.SIGINT)",  # interrupts no other thread
        "ending.come()",
    ],
)
def test_whichever_thread_takes_the_signal(send: str) -> None:
    done = run_python(
        "import os, signal, threading\n"
        "from warabi.service import ShutdownSignals\n"
        "with ShutdownSignals() as ending:\n"
        f"    threading.Timer(0.2, lambda: {send}).start()\n"
        "    ending.wait()\n"
        "    for _ in range(100_000): ending.come()\n"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_readiness_is_not_reported_if_serving_did_not_start(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        with serving("-t", "x", NOTIFY_SOCKET=str(tmp_path / "notify")) as service:
            assert service.process.wait(PATIENCE) == 1
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(100)


@pytest.mark.parametrize("path", ["/missing/notify", "relative", "vsock:2:1", "/" + "x" * 200])
def test_a_manager_that_is_not_there_does_not_matter(path: str) -> None:
    with serving("-t", "memory:", NOTIFY_SOCKET=path) as service:
        assert service.address
        assert service.end().count("NOTIFY_SOCKET") == 2


def test_an_early_signal_ends_it_as_well(tmp_path: Path, runtime_directory: Path) -> None:
    """From the moment that anything exists which would be left behind."""
    with serving("-t", f"file:{tmp_path}/target") as service:
        eventually(lambda: list(runtime_directory.glob(f"{service.process.pid}-*")))
        service.end()
    assert not list(runtime_directory.glob(f"{service.process.pid}-*"))


# The end, with clients at work


@pytest.mark.parametrize("transport", ["na+sm", "ofi+tcp"])
def test_the_end_during_traffic(tmp_path: Path, transport: str) -> None:
    """What was acknowledged is there; each client sees a lost connection and nothing else."""
    path = tmp_path / "target"
    acknowledged: dict[RegionID, bytes] = {}
    wrong: list[BaseException] = []

    def work(address: str, seed: int) -> None:
        try:
            with Engine(transport, client) as engine:
                target = handle(engine, address)
                for number in range(1_000_000):
                    data = pattern(5000, seed * 7 + number % 7)
                    acknowledged[target.create_and_write(data, persist=True)] = data
        except (errors.ConnectionLost, errors.ConnectionFailed):
            pass
        except BaseException as error:
            wrong.append(error)

    with serving("-t", f"file:{path}", "-a", transport) as service:
        address = service.address
        threads = [threading.Thread(target=work, args=(address, seed)) for seed in range(8)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(acknowledged) > 50)
        service.end()
        for thread in threads:
            thread.join(PATIENCE)
    assert not wrong
    with serving("-t", f"file:{path}") as service, Engine("na+sm", client) as engine:
        target = handle(engine, service.address)
        for region, data in acknowledged.items():
            assert target.read(region, 0, len(data)) == data
        # A request that was cut off before its answer may have taken effect, one for each client.
        assert len(list(target.list())) <= len(acknowledged) + len(threads)
        service.end()


def test_requests_that_have_come_in_are_answered(tmp_path: Path, client_engine: Engine) -> None:
    with serving("-t", f"file:{tmp_path}/target") as service:
        target = handle(client_engine, service.address)
        region = target.create(64 << 20)
        target.write(region, 0, bytes(64 << 20))
        request = target.persist_async(region, 0, 64 << 20)  # a moment's work for the medium
        target.size(region)  # is answered after the provider has taken up the one before
        service.process.terminate()
        request.wait()
        with pytest.raises((errors.ConnectionLost, errors.ConnectionFailed)):
            while True:
                target.size(region)
        assert service.process.wait(PATIENCE) == 0


@pytest.mark.parametrize("transport", ["na+sm", "tcp"])
def test_what_was_sent_before_the_end_is_answered(transport: str) -> None:
    """Also what nobody has looked at by then."""
    for _ in range(5):
        with serving("-t", "memory:", "-a", transport) as service:
            with raw_connection(service.address) as connection:
                peer = RawPeer(connection)
                peer.call([1, 0, "create", [8], None])
                service.process.send_signal(signal.SIGSTOP)
                for number in range(2, 52):
                    peer.send([number, 0, "create", [8], None])
                service.process.terminate()
                service.process.send_signal(signal.SIGCONT)
                assert [peer.reply()[0] for _ in range(50)] == list(range(2, 52))
                assert peer.closed()
            assert service.process.wait(PATIENCE) == 0


def test_a_peer_that_takes_no_replies_does_not_hold_up_the_end(client_engine: Engine) -> None:
    with serving("-t", "memory:") as service:
        address = service.address
        region = handle(client_engine, address).create_and_write(bytes(4 << 20))
        with raw_connection(address) as connection:
            peer = RawPeer(connection)
            for number in range(1, 9):
                peer.send([number, 0, "read", [region, 0, 4 << 20, False, False], None])
            start = time.monotonic()
            service.end()
            assert time.monotonic() - start < STALL_PATIENCE - 10


# Looking into a target


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    with serving("-t", "memory:") as service:
        yield service.address


@pytest.fixture
def address(served: str) -> Iterator[str]:
    """Of a provider without regions."""
    yield served
    with Engine("na+sm", client) as engine:
        target = handle(engine, served)
        for region in target.list():
            target.erase(region)


def test_put_ls_get_rm(address: str, tmp_path: Path) -> None:
    data = pattern(10_000_000)  # more than is read at a time
    file = tmp_path / "file"
    file.write_bytes(data)
    first = ok("put", address, file).decode().strip()
    second = ok("put", address, "-n", "/a name", stdin=b"from a pipe").decode().strip()
    empty = ok("put", address).decode().strip()
    assert ok("ls", address).decode().splitlines() == [
        f"{first} {len(data):>14}",
        f"{second} {11:>14} /a\\040name",
        f"{empty} {0:>14}",
    ]
    assert ok("get", address, first) == data
    assert ok("get", address, "/a name") == b"from a pipe"
    assert ok("get", address, "/a name", tmp_path / "out") == b""
    assert (tmp_path / "out").read_bytes() == b"from a pipe"
    assert ok("get", address, empty) == b""
    ok("rm", address, first)
    ok("rm", address, "/a name")
    assert ok("ls", address).decode() == f"{empty} {0:>14}\n"


def test_names_of_any_bytes(address: str, client_engine: Engine) -> None:
    target = handle(client_engine, address)
    target.link_name(target.create(0), os.fsdecode(b"/caf\xe9"))
    assert ok("ls", address).endswith(b" /caf\xe9\n")


AWKWARD = [
    "/two words",
    "/a\nnew line",
    "/tab\there",
    "/back\\slash",
    "/\x1b[31mred",
    "/it's",
    "/é",
]


def test_awkward_names_are_quoted_as_one_word(address: str, client_engine: Engine) -> None:
    target = handle(client_engine, address)
    region = target.create(5)
    for name in AWKWARD:
        target.link_name(region, name)
    (line,) = ok("ls", address).splitlines()
    words = line.split()
    assert words[:2] == [region.hex().encode(), b"5"]
    names = [
        re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), word).decode()
        for word in words[2:]
    ]
    assert sorted(names) == sorted(AWKWARD)


def test_awkward_names_on_a_terminal(address: str, client_engine: Engine) -> None:
    target = handle(client_engine, address)
    region = target.create(0)
    for name in AWKWARD:
        target.link_name(region, name)
    line = on_terminal(80, "ls", address).rstrip(b"\r\n")
    assert not re.search(rb"[\0-\x1f]", line)
    # What it shows can be given to a shell.
    shown = subprocess.run(
        ["bash", "-c", b"printf '%s\\0' " + line[48:]], capture_output=True, check=True, timeout=9
    )
    assert sorted(shown.stdout.decode().split("\0")[:-1]) == sorted(AWKWARD)


def test_names_in_errors_do_not_break_lines(address: str) -> None:
    assert "/no\\nsuch\\x1b" in fails("get", address, "/no\nsuch\x1b")


def test_a_listing_takes_few_requests(address: str, client_engine: Engine) -> None:
    target = handle(client_engine, address)
    regions = [target.create(i) for i in range(600)]
    for i in range(0, 600, 7):
        for k in range(3):
            target.link_name(regions[i], f"/{i}-{k}-" + "x" * 240)
    asked: list[tuple[Any, ...]] = []
    call = target._link.call

    def counted(*arguments: Any) -> Any:
        asked.append(arguments)
        return call(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target._link, "call", counted)
        found = dict(target.list_stats())
    assert [*found] == regions
    assert [one.size for one in found.values()] == [*range(600)]
    assert found[regions[7]] == target.stat(regions[7])
    assert len(asked) <= 6
    assert {name for name, *_ in asked} == {"list_stats"}
    for region in regions[100:500]:
        target.erase(region)
    assert [region for region, _ in target.list_stats(3)] == regions[:100] + regions[500:]


def test_more_names_than_a_reply_takes(address: str, client_engine: Engine) -> None:
    target = handle(client_engine, address)
    deep = "/" + "/".join("d" * 200 for _ in range(15))
    link = target._link
    ino = 1
    for part in deep.split("/")[1:]:
        ino = link.call("mkdir", ino, part.encode(), 0o755, 0, 0, 0).ino
    regions = [target.create(1) for _ in range(3)]
    for i, region in enumerate(regions):
        for k in range(400):
            target.link_name(region, f"{deep}/{i}-{k}")
    found = dict(target.list_stats())
    assert [*found] == regions
    assert all(0 < len(one.names) < 400 for one in found.values())
    assert len(ok("ls", address).splitlines()) == 3


def test_a_reply_with_long_paths_is_short(address: str, client_engine: Engine) -> None:
    """To find them takes time by their directories, not by their length."""
    target = handle(client_engine, address)
    link = target._link
    ino = 1
    for _ in range(200):
        ino = link.call("mkdir", ino, b"d", 0o755, 0, 0, 0).ino
    regions = [target.create(1) for _ in range(60)]
    for i, region in enumerate(regions):
        above = link.call("mkdir", ino, b"%d" % i, 0o755, 0, 0, 0).ino
        link.call("link", region.slot, above, b"name")
    page = link.call("list_stats", RegionID(), 250)
    assert 0 < len(page) < 20
    assert [region for region, _ in target.list_stats()] == regions
    assert all(found.names[0].count("/") == 202 for _, found in page)


@pytest.mark.parametrize("ends", ["data", "holes"])
def test_holes_are_kept(tmp_path: Path, ends: str) -> None:
    size, data = 40 << 20, pattern(1 << 20)
    source, back = tmp_path / "source", tmp_path / "back"
    with source.open("wb") as file:
        for offset in (0, 20 << 20, size - len(data)) if ends == "data" else (9 << 20, 20 << 20):
            file.seek(offset)
            file.write(data)
        file.truncate(size)
    used = source.stat().st_blocks
    with serving("-t", f"file:{tmp_path}/target") as service, Engine("na+sm", client) as engine:
        address = service.address
        region = ok("put", address, source, "-n", "/sparse").decode().strip()
        copy = ok("clone", address, region, "-n", "/copy").decode().strip()
        for found in (region, "/copy"):
            ok("get", address, found, back)
            assert back.read_bytes() == source.read_bytes()
            assert back.stat().st_blocks <= used + 64
            back.unlink()
        assert ok("get", address, copy) == source.read_bytes()
        target = handle(engine, address)
        for each in (region, copy):
            extents = target.data_extents(RegionID(bytes.fromhex(each)))
            assert sum(size for _, size in extents) <= (used + 64) * 512
        assert run("clone", address, "/copy", "-n", "/sparse").returncode == 1
        assert sorted(target.list_names()) == ["copy", "sparse"]
        with source.open("rb") as file:
            file.seek(10 << 20)
            rest = ok_from(file, "put", address).decode().strip()
        assert ok("get", address, rest) == source.read_bytes()[10 << 20 :]


def test_a_file_larger_than_the_file_system_is_kept_with_its_hole(tmp_path: Path) -> None:
    size, source, back = 1 << 40, tmp_path / "source", tmp_path / "back"
    source.write_bytes(pattern(3 << 20))
    with source.open("r+b") as file:
        file.truncate(size)
        file.seek(-4, os.SEEK_END)
        file.write(b"last")
    with serving("-t", f"file:{tmp_path}/target") as service:
        address = service.address
        region = ok("put", address, source).decode().strip()
        copy = ok("clone", address, region).decode().strip()
        ok("get", address, copy, back)
    with back.open("rb") as file:
        assert file.read(4 << 20) == pattern(3 << 20) + bytes(1 << 20)
        assert file.seek(-4, os.SEEK_END) == size - 4
        assert file.read() == b"last"
    assert back.stat().st_blocks * 512 < 4 << 20


def ok_from(file: IO[bytes], *arguments: str) -> bytes:
    """As :func:`ok`, with a file as the standard input."""
    return subprocess.run(
        [*COMMAND, *arguments], stdin=file, capture_output=True, env=environment(),
        timeout=PATIENCE, check=True,
    ).stdout  # fmt: skip


def test_put_takes_little_memory(address: str, tmp_path: Path) -> None:
    """Of a file and of a pipe, more than there may be in memory."""
    size = 100 << 20
    file = tmp_path / "file"
    with open(file, "wb") as sparse:
        sparse.truncate(size)
        sparse.seek(60 << 20)
        sparse.write(b"here")
    program = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (80 << 20, 80 << 20))\n"
    limited = [sys.executable, "-c", program + COMMAND[-1]]
    for source in (["cat", str(file)], ["true"]):
        with subprocess.Popen(source, stdout=subprocess.PIPE) as pipe:
            name = "-" if source[0] == "cat" else str(file)
            done = subprocess.run(
                [*limited, "put", address, name], stdin=pipe.stdout, capture_output=True,
                env=environment(), timeout=PATIENCE, check=False,
            )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, b"")
        region = done.stdout.decode().strip()
        assert f"{region} {size:>14}\n" in ok("ls", address).decode()
        ok("get", address, region, tmp_path / "out")
        with open(tmp_path / "out", "rb") as out:
            assert os.fstat(out.fileno()).st_size == size
            assert os.pread(out.fileno(), 6, (60 << 20) - 1) == b"\0here\0"
        ok("rm", address, region)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_put_that_is_interrupted_leaves_nothing(address: str, number: signal.Signals) -> None:
    with subprocess.Popen(
        [*COMMAND, "put", address, "-n", "/name"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=environment(),
    ) as process:  # fmt: skip
        try:
            assert process.stdin is not None
            process.stdin.write(bytes(20 << 20))
            process.stdin.flush()
            eventually(lambda: ok("ls", address))
            process.send_signal(number)
            assert process.wait(PATIENCE) == 128 + number
            assert process.stderr is not None
            assert process.stderr.read().strip() == b""
        finally:
            process.kill()
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
    assert ok("ls", address) == b""


def test_a_put_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    settings = {"type": "memory", "config": {"capacity": 10 << 20}}
    provider = {"type": "warabi", "config": {"target": settings}}
    config = tmp_path / "config"
    config.write_text(json.dumps({"providers": [provider]}))
    (tmp_path / "file").write_bytes(bytes(20 << 20))
    with serving(config) as service:
        address = service.address
        assert "do not fit" in fails("put", address, tmp_path / "file")
        assert "do not fit" in fails("put", address, stdin=bytes(20 << 20))
        assert ok("ls", address) == b""
        service.end()


def test_a_listing_whose_reader_closes_the_pipe(address: str, client_engine: Engine) -> None:
    target = handle(client_engine, address)
    for _ in range(3000):
        target.create(1)
    script = 'set -o pipefail; "$@" | head -1'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *COMMAND, "ls", address], capture_output=True,
        env=environment(), timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.count(b"\n"), done.stderr) == (141, 1, b"")


WITHOUT_RIGHTS = """
import difflib, importlib, json, os, pkgutil, sys  # click uses difflib
import warabi
for module in pkgutil.walk_packages(warabi.__path__, "warabi."):  # that another user may not read
    importlib.import_module(module.name)
"host".encode("idna")
os.setgroups([2])
os.setgid(2)
os.setuid(1)
done = []
for arguments in json.loads(sys.argv[1]):
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.dup2(theirs, 1)
            os.dup2(theirs, 2)
            sys.argv = ["warabi", *arguments]
            warabi.tools.cli.main.main()
        except SystemExit as ended:
            os._exit(ended.code)
        finally:
            os._exit(99)
    os.close(theirs)
    with open(ours) as output:
        text = output.read()
    done.append((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text))
print(json.dumps(done))
"""


def test_places_that_may_not_be_used(tmp_path: Path) -> None:
    top = Path(tempfile.mkdtemp(dir="/tmp", prefix="warabi-cli-"))
    try:
        top.chmod(0o755)
        (top / "closed").mkdir(mode=0o700)
        ok("export", made(tmp_path / "target"), top / "archive.tar")
        (top / "archive.tar").chmod(0o644)
        commands = [
            ["import", f"{top}/archive.tar", f"{top}/closed/new"],
            ["import", f"{top}/archive.tar", f"{top}/new"],
            ["export", f"{top}/closed/new", f"{top}/out.tar"],
            ["serve", "-a", "tcp", "-t", f"file:{top}/closed/new"],
            ["fsck", f"{top}/closed/new"],
        ]
        done = run_python(WITHOUT_RIGHTS, json.dumps(commands))
        assert done.returncode == 0, done.stderr
        for arguments, (status, text) in zip(commands, json.loads(done.stdout), strict=True):
            assert status == (8 if arguments[0] == "fsck" else 1), (arguments, status, text)
            # All that it wrote, to standard error or standard output, is one line.
            assert re.fullmatch(
                rf"warabi: .*{top}/[^\n]*(Permission denied|this user)[^\n]*\n", text
            ), text
            assert "Errno" not in text
    finally:
        shutil.rmtree(top)


def made(path: Path) -> Path:
    """A target at *path*."""
    with serving("-t", f"file:{path}") as service:
        assert service.address
        service.end()
    return path


def test_another_provider(config: Path) -> None:
    with serving(config) as service:
        address = service.address
        region = ok("put", address, "-p", "2", stdin=b"x").decode().strip()
        assert ok("ls", address, "-p", "1") == b""
        assert ok("get", "-p", "2", address, region) == b"x"
        assert "no provider 0" in fails("ls", address)
        service.end()


def test_bad_input(address: str, tmp_path: Path) -> None:
    unknown = "0" * 31 + "1"
    assert "InvalidRegion" not in fails("get", address, unknown)
    assert "/missing" in fails("get", address, "/missing")
    assert "missing" in fails("rm", address, "/missing")
    fails("rm", address, unknown)
    fails("get", address, "/")
    assert "no such engine" in fails("ls", "na+sm://999999999-0")
    assert "expected" in fails("ls", "na+sm")
    assert "provider_id" in fails("ls", address, "-p", "-1")
    for wrong in (["get", address, "no ID"], ["rm", address, "00"], ["put", address, "missing"]):
        done = run(*wrong)
        assert done.returncode == 2
        assert b"Traceback" not in done.stderr


def test_standard_input_that_is_closed(address: str, tmp_path: Path) -> None:
    for arguments in (["put", address], ["import", "-", str(tmp_path / "new")]):
        done = subprocess.run(
            ["sh", "-c", 'exec "$@" <&-', "sh", *COMMAND, *arguments], capture_output=True,
            env=environment(), timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.endswith(b": standard input is closed\n")
    assert not list(tmp_path.iterdir())
    assert "link_name" in fails("put", address, "-n", "")
    assert ok("ls", address) == b""


def test_put_under_a_name_that_is_taken_leaves_nothing(address: str) -> None:
    ok("put", address, "-n", "/name", stdin=b"first")
    assert "link_name /name: File exists" in fails("put", address, "-n", "/name", stdin=b"second")
    assert len(ok("ls", address).splitlines()) == 1


def test_output_that_cannot_be_written(address: str) -> None:
    region = ok("put", address, stdin=bytes(1 << 20)).decode().strip()
    assert "No space left" in fails("get", address, region, "/dev/full")


def test_help_and_version() -> None:
    assert b"CONFIG is TOML" in ok("serve", "--help")
    assert all(command in ok("--help") for command in (b"serve", b"ls", b"put", b"get", b"rm"))
    assert ok("--version").startswith(b"warabi, version ")


def test_the_commands_that_only_call_import_little() -> None:
    script = "import sys, warabi.tools.cli.main\n"
    script += "assert not {'pydantic', 'trio', 'numpy'} & set(sys.modules)"
    done: Any = subprocess.run([sys.executable, "-c", script], env=environment(), check=False)
    assert done.returncode == 0
