"""Fixtures of the mount's tests; what they are made of is in ``support.py``."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount import support
from tests.mount.support import (
    BACKENDS,
    Mount,
    is_mounted,
    mounting,
    processes_of,
    run,
    source_of,
    wait_until,
    watchdog,
)
from warabifs.frontends.registry import DEFAULT, FRONT_ENDS
from warabifs.mount import install, utab

CLONE_NEWNS = 0x20000


OVER_BOTH = (
    "test_append",  # O_APPEND of several mounts: what goes past the page cache
    "test_async_direct_io",  # the kernel drops pages in time
    "test_consistency",  # notifications, holding writes back
    "test_file_handles",  # generations, lookups of dots, lookup counts
    "test_lifecycle",  # mounting, signals, unmounting, kill -9
    "test_reports",  # counters of requests, and a file that is no region
    "test_outage",  # errors, and requests whose effect is unknown
    "test_sync_writes",  # O_SYNC past the page cache
    "test_unprivileged",  # fusermount3, fstab, namespaces
)
"""Modules that run over both front ends: about what a front end translates."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] in OVER_BOTH:
        metafunc.parametrize("front_end", FRONT_ENDS, indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def front_end(request: pytest.FixtureRequest) -> Iterator[str]:
    """The front end of every mount of a test."""
    name: str = getattr(request, "param", DEFAULT)
    support.FRONT_END[:] = [f"frontend={name}"] if name != DEFAULT else []
    yield name
    support.FRONT_END.clear()


def limit_of(request: pytest.FixtureRequest) -> float:
    """Seconds after which a test's mount is killed, a little before the test's own limit."""
    marker = request.node.get_closest_marker("timeout")
    limit = marker.args[0] if marker else float(request.config.getini("timeout") or 120)
    return float(limit) * 0.9


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty directory, removed afterwards; fails when a mount or a process is left in it."""
    with disposable("/tmp") as path:
        yield path


@contextlib.contextmanager
def disposable(parent: str) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="warabifs-test-", dir=parent))
    path.chmod(0o755)  # other users get in as far as the tests say
    try:
        yield path
    finally:
        left = [line for line in (path, *path.glob("*")) if is_mounted(line)]
        for mountpoint in left:
            run("fusermount3", "-u", "-z", mountpoint, check=False)
        with contextlib.suppress(AssertionError):  # the processes are told below
            wait_until(lambda: not processes_of(path), "the end of what persists there")
        processes = processes_of(path)
        for target in map(utab._target, utab._lines()):  # of what was killed
            left_by = os.fsdecode(target.removeprefix(b"TARGET="))
            if Path(left_by).is_relative_to(path):
                utab._update(b"", os.fsencode(left_by))
        shutil.rmtree(path, ignore_errors=True)
    assert not left, f"left mounted: {left}"
    assert not processes, f"left running: {processes}"


@pytest.fixture
def machine() -> Iterator[None]:
    """What the machine has once is this test's, until it ends: the mode of ``/dev/fuse``,
    ``/etc/fuse.conf``, and the helpers in ``/sbin``, of which there are none.

    For those who change it, or look at it, while tests run in several processes.
    """
    lock = os.open("/etc", os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with _helpers_aside():
            yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def _helpers_aside() -> Iterator[None]:
    """No helpers of another checkout while the block runs; what was there comes back."""
    before = {path: path.read_bytes() for path in install._files(Path("/")) if install._ours(path)}
    for path in before:
        path.unlink()
    try:
        yield
    finally:
        for path, content in before.items():
            path.write_bytes(content)
            path.chmod(0o644 if path.suffix == ".8" else 0o755)


@pytest.fixture
def helpers(machine: None) -> Iterator[None]:
    """The helpers of this checkout, where mount(8) looks."""
    list(install.install(Path("/")))
    try:
        yield
    finally:
        list(install.uninstall(Path("/")))


@pytest.fixture
def own_namespace() -> Iterator[None]:
    """A mount namespace of the test's own, which sees all mounts of the machine.

    Else another process may copy the test's mounts into a new namespace of its own, where they
    stay mounted when the test unmounts them.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    outside, directory = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY), os.getcwd()
    try:
        assert libc.unshare(CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
        try:
            run("mount", "--make-rprivate", "/")
            yield
        finally:
            assert libc.setns(outside, CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
            os.chdir(directory)
    finally:
        os.close(outside)


@pytest.fixture(params=BACKENDS)
def mounted(request: pytest.FixtureRequest, place: Path) -> Iterator[Mount]:
    """A fresh, empty mount.

    Its source is one of ``SOURCES``: those of ``BACKENDS``, unless the test says
    ``@pytest.mark.parametrize("mounted", SOURCES, indirect=True)``.
    """
    with (
        source_of(request.param, place) as (source, options),
        mounting(source, place, *options) as mount,
        watchdog(mount, limit_of(request)),
    ):
        yield mount
