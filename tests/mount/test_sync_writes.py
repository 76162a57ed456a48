"""Writes with ``O_SYNC`` and ``O_DSYNC`` are durable when they return.

For a file that goes past the page cache the kernel leaves that to the file system.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from tests.mount.support import mounting, serving
from tests.mount.together import OPTIONS
from warabi.target import opening
from warabi.target.config import FileConfig

FLAGS = {
    "sync": os.O_SYNC,
    "dsync": os.O_DSYNC,
    "sync and append": os.O_SYNC | os.O_APPEND,
    "dsync and direct": os.O_DSYNC | os.O_DIRECT,
}
PAGE = mmap.PAGESIZE


def write(path: Path, flags: int) -> bytes:
    """Make a file and write to it; its content."""
    data = b"synced" * (2 * PAGE)
    with mmap.mmap(-1, len(data)) as aligned:
        aligned[:] = data
        fd = os.open(path, os.O_CREAT | os.O_WRONLY | flags)
        try:
            assert os.write(fd, aligned) == len(data)
        finally:
            os.close(fd)
    return data


@pytest.mark.parametrize("option", ["direct_io", "atime"])
def test_synchronous_writes_survive_a_kill_of_the_mount(place: Path, option: str) -> None:
    with mounting(f"file:{place}/target", place, option) as mount:
        for name, flags in FLAGS.items():  # one by one: to sync one may make others durable
            data = write(mount.path / name, flags)
            mount.kill()
            mount.start()
            assert (mount.path / name).read_bytes() == data


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("option", ["direct_io", "atime"])
def test_synchronous_writes_survive_a_kill_of_the_provider(
    place: Path, flags: int, option: str
) -> None:
    config = {"type": "abtio", "config": {"path": str(place / "target"), "create_if_missing": True}}
    with (
        serving("tcp", config) as provider,
        mounting(provider.address, place, *OPTIONS, option, "reconnect=0") as mount,
    ):
        data = write(mount.path / "file", flags)
        provider.kill()
        with opening.open_file(FileConfig(path=str(place / "target"))) as target:
            region = target.namespace.open_name("/file")
            assert target.read(region, 0, target.size(region)) == data
