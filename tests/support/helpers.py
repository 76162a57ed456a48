"""What several test modules share: other processes, raw peers, and bytes to store."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trustme

from warabi.backends import memory
from warabi.backends.memory import MemoryConfig
from warabi.protocol import address, wire
from warabi.protocol.auth import TlsFiles
from warabi.target.opening import open_backend
from warabi.target.target import Target

if TYPE_CHECKING:
    import datetime

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0
"""Seconds after which something that should have ended counts as hung."""
MEMORY: dict[str, Any] = {"target": {"type": "memory"}}


def open_memory(config: MemoryConfig, *, limit: int | None = None) -> Target:
    """A new target in memory; *limit*: most bytes of memory for it."""
    return open_backend(memory.BACKEND, config, limit=limit)


def file_config(path: Path, **settings: Any) -> dict[str, Any]:
    """A provider's configuration for a file target that is made when missing."""
    config = {"path": str(path), "create_if_missing": True, **settings}
    return {"target": {"type": "file", "config": config}}


def summed_config(path: Path, **settings: Any) -> dict[str, Any]:
    """As ``file_config``, for a file target with checksums."""
    return file_config(path, checksums=True, **settings)


def pmem_config(path: Path, **settings: Any) -> dict[str, Any]:
    """As ``file_config``, for a pmem target."""
    config = {"path": str(path), "create_if_missing_with_size": 1 << 30, **settings}
    return {"target": {"type": "pmem", "config": config}}


def rados_config(path: Path, **settings: Any) -> dict[str, Any]:
    """As ``file_config``, for a target in the pool of the fixture ``pool``."""
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    config = {"pool": "warabi", "name": name, "create_if_missing": True, **settings}
    return {"target": {"type": "rados", "config": config}}


PIPELINE: dict[str, Any] = {
    "type": "pipeline",
    "config": {
        "num_pools": 3,
        "num_buffers_per_pool": 2,
        "first_buffer_size": 4096,
        "buffer_size_multiplier": 8,
    },
}
PIPELINED = 3
"""How much higher the IDs are of the providers in the tests' processes that have a pipeline."""


def three_backends(path: Path) -> list[dict[str, Any]]:
    """Configurations for memory, files and pmem, and for the same again with a pipeline."""
    plain = [MEMORY, file_config(path / "file"), pmem_config(path / "pmem")]
    again = [MEMORY, file_config(path / "file2"), pmem_config(path / "pmem2")]
    return plain + [{**config, "transfer_manager": PIPELINE} for config in again]


HERE = ("localhost", "127.0.0.1", "::1")
"""What this host is called in the certificates of tests."""


def tls_config(
    directory: Path,
    authority: trustme.CA | None = None,
    names: Sequence[str] = HERE,
    expires: datetime.datetime | None = None,
) -> dict[str, Any]:
    """An engine's configuration for TLS, serving or not, with a certificate made in *directory*.

    Args:
        authority: who signs the certificate, and those that the peers must have; a new one
            unless given.
        names: whom the certificate is for.
        expires: until when.
    """
    authority = authority or trustme.CA()
    made = authority.issue_cert(*names, not_after=expires)
    files = {name: directory / f"{name}.pem" for name in ("certificate", "key", "ca")}
    files["certificate"].write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
    files["key"].touch(0o600)
    files["key"].write_bytes(made.private_key_pem.bytes())
    files["ca"].write_bytes(authority.cert_pem.bytes())
    return {"tls": {name: str(path) for name, path in files.items()}}


@functools.lru_cache(maxsize=64)
def pattern(size: int, seed: int = 0) -> bytes:
    """*size* bytes that no other offset, size or seed has."""
    return random.Random(size * 1000 + seed).randbytes(size)


def eventually(condition: Callable[[], object], patience: float = PATIENCE) -> None:
    """Wait until *condition* is true, or fail."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"still not: {condition}"
        time.sleep(0.005)


def memories(pid: int | str = "self") -> dict[int, int]:
    """The memory that a process has in large regions: its number, and how many bytes it takes."""
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if "warabi-region" in os.readlink(link):
                info = link.stat()
                found[info.st_ino] = info.st_blocks * 512
    return found


def environment(**extra: str) -> dict[str, str]:
    """For a subprocess: this checkout's packages, warnings are errors, and a terminal has its own
    size, not the one that pytest-xdist gives its workers."""
    ours = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", "COLUMNS": "", "LINES": ""}
    return {**os.environ, **ours, **extra}


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in another process, with the time that a hang is given."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip


@contextlib.contextmanager
def python_process(
    *arguments: str, preloaded: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """``python ARGUMENTS...`` as a process with pipes, killed at the end; with a library loaded
    before others, in place of what they define."""
    preload = {} if preloaded is None else {"LD_PRELOAD": str(preloaded)}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=environment() | preload, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


class Served:
    """Another process that serves providers, and has begun to wait for its end.

    It says where it is before that; a signal to end would just kill it then.
    """

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process = process
        self.address = address
        eventually(self._waits_for_its_end)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        """Keep it from running, until SIGCONT; returns when it does not run any more."""
        self.signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")
        eventually(lambda: all(") T " in (task / "stat").read_text() for task in tasks.iterdir()))

    def _waits_for_its_end(self) -> bool:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        caught = int(status.split("SigCgt:")[1].split()[0], 16)
        return bool(caught >> (signal.SIGTERM - 1) & 1)

    def kill(self) -> None:
        """End it without a chance to clean up, and wait."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextlib.contextmanager
def provider_process(
    transport: str, *configs: dict[str, Any], engine: dict[str, Any] | None = None
) -> Iterator[Served]:
    """A process that serves *configs* under the provider IDs 1, 2, ... at ``served.address``."""
    providers = json.dumps({str(i): config for i, config in enumerate(configs, 1)})
    script = str(ROOT / "tests" / "support" / "serve.py")
    with python_process(script, transport, providers, json.dumps(engine or {})) as process:
        assert process.stdout is not None
        text = process.stdout.readline().strip()
        assert text, f"the provider process ended with status {process.wait(PATIENCE)}"
        yield Served(process, text)


@contextlib.contextmanager
def raw_connection(text: str, config: dict[str, Any] | None = None) -> Iterator[socket.socket]:
    """A connected socket to the engine at *text*, on which nothing was said yet.

    With an engine's *config* for TLS it is what that library's sockets are, the handshake done.
    """
    with address.connect(address.parse(text), 10.0) as connection:
        connection.settimeout(PATIENCE)
        if not config:
            yield connection
            return
        context = TlsFiles(**config["tls"]).client
        with context.wrap_socket(connection, server_hostname="localhost") as encrypted:
            yield encrypted


class RawPeer:
    """A client that says what it is told to, right or wrong."""

    def __init__(
        self,
        connection: socket.socket,
        limits: wire.Limits | None = None,
        more: dict[str, Any] | None = None,
    ) -> None:
        self.socket = connection
        self._wire = wire.ProtocolConnection(wire.Limits())
        self.opening = wire.opening(limits or wire.Limits(), more)
        connection.sendall(self.opening)
        opened = self._event()
        assert isinstance(opened, wire.OpeningReceived)
        self.opened = opened

    def _event(self) -> wire.Event:
        while (event := self._wire.next_event()) is wire.NEED_DATA:
            count = self.socket.recv_into(self._wire.buffer())
            if count == 0:
                raise EOFError
            self._wire.received(count)
        return event

    def send(self, header: Any, payload: bytes = b"") -> None:
        self.socket.sendall(wire.frame(header, len(payload)) + payload)

    def reply(self) -> Any:
        """The header of the next reply; a payload is read and dropped."""
        event = self._event()
        assert isinstance(event, wire.Message)
        if event.payload:
            self._wire.accept_payload(None)
            assert self._event() is wire.PAYLOAD_DONE
        return event.header

    def call(self, header: Any, payload: bytes = b"") -> Any:
        self.send(header, payload)
        return self.reply()

    def closed(self) -> bool:
        """Whether the engine ends the connection, whatever it says before."""
        try:
            while True:
                self.reply()
        except (EOFError, ConnectionResetError):
            return True


class HalfReply:
    """A provider that answers a ping, and of a read's reply sends the first half only.

    The rest follows when told to; anything else is then answered with ``None``.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._rest = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def send_rest(self) -> None:
        self._rest.set()

    def close(self) -> None:
        self._rest.set()
        self._thread.join(PATIENCE)

    def _serve(self) -> None:
        accepted, _ = self._listener.accept()
        with accepted, contextlib.suppress(EOFError, ConnectionError):
            peer = RawPeer(accepted)
            while True:
                request_id, _, name, arguments, _ = peer.reply()
                if name != "read":
                    peer.send([request_id, None])
                    continue
                reply = wire.frame([request_id, None], arguments[2]) + b"r" * arguments[2]
                half = len(reply) - arguments[2] // 2
                accepted.sendall(reply[:half])
                self._rest.wait(PATIENCE)
                accepted.sendall(reply[half:])


@contextlib.contextmanager
def half_reply() -> Iterator[tuple[str, HalfReply]]:
    """Address and handle of a :class:`HalfReply`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        provider = HalfReply(listener)
        try:
            yield f"tcp://127.0.0.1:{listener.getsockname()[1]}", provider
        finally:
            provider.close()
