"""A Ceph cluster on loopback, by ``tools/ceph``, for as long as a test or a session lasts."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.helpers import PATIENCE, ROOT, environment

TOOL = ROOT / "tools" / "ceph"


def run(*arguments: object, check: bool = True, **extra: str) -> subprocess.CompletedProcess[str]:
    """``tools/ceph ARGUMENTS...``, with *extra* in its environment."""
    return subprocess.run(
        [TOOL, *map(str, arguments)],
        env=environment(**extra), capture_output=True, text=True, timeout=PATIENCE, check=check,
    )  # fmt: skip


@contextlib.contextmanager
def running(directory: Path, *options: str) -> Iterator[Path]:
    """A cluster in *directory*, started with *options*; yields its ``ceph.conf``.

    It ends with the block, or with this process, however that ends: a process of its own waits for
    the end of its standard input.
    """
    stopping = f'read _; exec "{TOOL}" stop "{directory}"'
    with subprocess.Popen(["sh", "-c", stopping], stdin=subprocess.PIPE) as reaper:
        try:
            run("start", *options, directory)
            yield directory / "ceph.conf"
        finally:
            reaper.communicate(timeout=PATIENCE)
