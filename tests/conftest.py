"""Fixtures for every test: nothing may leak, and other processes to talk to."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.support import ceph
from tests.support.helpers import Served, file_config, provider_process, three_backends, tls_config
from tests.support.migrations import fill, handle
from warabi._core import log_limit
from warabi.client import TargetHandle
from warabi.engine import Engine, client
from warabi.server import Provider
from warabifs.frontends.registry import DEFAULT, FRONT_ENDS

hypothesis.settings.register_profile(
    "warabi",
    deadline=None,
    database=None,
    # How long it takes to think of an example is a matter of what else the machine does.
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("warabi")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "needs(*abilities, run=True): what the mount's front end must have; run=False where it"
        " fails only when time is up, or by chance",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs an ability must fail on mounts by a front end without it."""
    for item in items:
        abilities = FRONT_ENDS[_front_end(item)].abilities
        for mark in item.iter_markers("needs"):
            lacks = set(mark.args) - abilities
            if lacks:
                reason, run = ", ".join(sorted(lacks)), mark.kwargs.get("run", True)
                item.add_marker(pytest.mark.xfail(reason=reason, run=run, strict=True))


def _front_end(item: pytest.Item) -> str:
    """The one that a parameter names, such as ``file-pyfuse3``; else the default."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    words = {word for one in parameters if isinstance(one, str) for word in one.split("-")}
    return next((name for name in FRONT_ENDS if name in words - {DEFAULT}), DEFAULT)


_GRACE = 30.0
"""Seconds that threads and processes, which were told to end, have for it."""


@pytest.fixture(scope="session", autouse=True)
def runtime_directory() -> Iterator[Path]:
    """A place of our own for local sockets, which is empty again at the end."""
    directory = Path(tempfile.mkdtemp(prefix="wrb"))  # short: socket paths have 107 bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WARABI_RUNTIME_DIR", str(directory))
        yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session", autouse=True)
def every_message() -> Iterator[None]:
    """What one test has logged leaves out nothing that another one looks for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_limit, "LOG_INTERVAL", 1e-9)
        yield


@pytest.fixture(scope="session")
def halt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``support/halt.c``, to be preloaded."""
    library = tmp_path_factory.mktemp("halt") / "halt.so"
    source = Path(__file__).parent / "support" / "halt.c"
    flags = ("-O1", "-fPIC", "-shared", "-fno-builtin", "-Wall", "-Wextra", "-Werror")
    subprocess.run(["gcc", *flags, source, "-o", library], check=True, timeout=60)
    return library


def _descriptors() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue  # the listing's own
    return found


def _children() -> set[str]:
    found = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread ended
            found |= set(Path(f"/proc/self/task/{task}/children").read_text().split())
    return found


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("warabi")}


@pytest.fixture(autouse=True)
def nothing_leaks(runtime_directory: Path) -> Iterator[None]:
    """Fail a test that leaves descriptors, threads of ours, processes or socket files behind."""

    def sockets() -> set[str]:
        """Of living processes: who is killed leaves one, which the next engine removes."""
        names = os.listdir(runtime_directory)
        return {name for name in names if os.path.exists(f"/proc/{name.split('-')[0]}")}

    def state() -> tuple[dict[str, str], set[threading.Thread], set[str], set[str]]:
        return _descriptors(), _threads(), _children(), sockets()

    def leaked() -> list[object]:
        fds, threads, children, files = state()
        return [
            *sorted(fds.items() - before[0].items()),
            *(thread.name for thread in threads - before[1]),
            *(f"process {pid}" for pid in children - before[2]),
            *(files - before[3]),
        ]

    before = state()
    yield
    deadline = time.monotonic() + _GRACE
    found = leaked()
    while found and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
        found = leaked()
    assert not found, f"leaked: {found}"


@pytest.fixture(scope="session")
def local_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A process that serves memory (provider 1), files (2) and pmem (3) on this host, and each
    again (4 to 6) with a pipeline."""
    path = tmp_path_factory.mktemp("served")
    with provider_process("na+sm", *three_backends(path)) as served:
        yield served


@pytest.fixture(scope="session")
def tcp_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """As ``local_process``, over TCP."""
    path = tmp_path_factory.mktemp("served")
    with provider_process("ofi+tcp", *three_backends(path)) as served:
        yield served


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An engine's configuration for TLS, for both sides."""
    return tls_config(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="session")
def tls_process(tmp_path_factory: pytest.TempPathFactory, tls: dict[str, Any]) -> Iterator[Served]:
    """As ``local_process``, over TCP with TLS; clients need the configuration ``tls``."""
    path = tmp_path_factory.mktemp("served")
    with provider_process("ofi+tcp", *three_backends(path), engine=tls) as served:
        yield served


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The ``ceph.conf`` of a cluster with the pool ``warabi``, without authentication.

    One for each process of pytest: it starts in 2 s and takes 200 MB of memory.
    """
    with (
        ceph.running(tmp_path_factory.mktemp("ceph") / "cluster") as conf,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("CEPH_CONF", str(conf))  # also for processes that tests start
        yield conf


@pytest.fixture
def engine() -> Iterator[Engine]:
    """A serving engine, ``na+sm``."""
    with Engine("na+sm") as engine:
        yield engine


@pytest.fixture
def client_engine() -> Iterator[Engine]:
    """A client's engine."""
    with Engine("na+sm", client) as engine:
        yield engine


@pytest.fixture
def moving(engine: Engine, tmp_path: Path) -> tuple[Provider, Provider, TargetHandle]:
    """A provider with a filled file target, one without a target, and a handle to the first."""
    source = Provider(engine, 1, file_config(tmp_path / "here" / "source"))
    destination = Provider(engine, 2, {})
    target = handle(engine, str(engine.addr()), 1)
    fill(target)
    return source, destination, target
