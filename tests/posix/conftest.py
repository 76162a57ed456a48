"""Where the tests of system calls work: a tmpfs, and a mount of each kind of source.

The tmpfs is the oracle: a test that fails there expects what Linux does not do.  Where a tmpfs does
not do all that other file systems do, an ext4 is, on a disk that is a file.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.test_loop import make as make_disk
from tests.crash.test_loop import mounted as mounted_disk
from tests.mount.conftest import disposable, limit_of
from tests.mount.conftest import machine as machine  # a fixture
from tests.mount.conftest import place as place  # another
from tests.mount.support import BACKENDS, PASSED, PYFUSE3, Mount, mounting, source_of, watchdog

MOUNTED = (*BACKENDS, "engine", *PASSED, *PYFUSE3)


@pytest.fixture(scope="package", params=["tmpfs", *MOUNTED])
def shared(request: pytest.FixtureRequest) -> Iterator[Path | Mount]:
    """A tmpfs, an ext4 or a mount, for all tests here."""
    if request.param == "tmpfs":
        with disposable("/dev/shm") as path:
            yield path
        return
    if request.param == "ext4":
        with disposable("/tmp") as path:
            make_disk(path / "image", "ext4", 256 << 20)
            with mounted_disk(path / "image", path / "mnt") as disk:
                yield disk
        return
    with (
        disposable("/tmp") as path,
        source_of(request.param, path) as (source, options),
        mounting(source, path, *options) as mount,
    ):
        yield mount


@pytest.fixture
def passed(shared: Path | Mount) -> bool:
    """Whether the kernel reads and writes large files, or all, by itself."""
    return isinstance(shared, Mount) and "passthrough" in shared.options


@pytest.fixture
def where(request: pytest.FixtureRequest, shared: Path | Mount) -> Iterator[Path]:
    """An empty directory on it."""
    with contextlib.ExitStack() as stack:
        root = shared
        if isinstance(root, Mount):
            stack.enter_context(watchdog(root, limit_of(request)))
            stack.callback(root.check_log)
            root = root.path
        path = root / "d"
        path.mkdir(mode=0o755)
        stack.callback(shutil.rmtree, path)
        yield path
