"""Region files sent from the page cache: current data, and no SIGBUS."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.helpers import eventually, file_config
from warabi.backends.page_cache import LEAST, CachedFiles
from warabi.client import Client, RegionID, TargetHandle
from warabi.engine import Engine, client
from warabi.errors import CorruptTarget
from warabi.server import Provider
from warabi.target.target import Target

SIZE = 1 << 20


class Served:
    """A file target served over TCP by this process."""

    def __init__(self, handle: TargetHandle, target: Target, path: Path) -> None:
        self.handle = handle
        self.target = target
        self._path = path

    def file(self, region: RegionID) -> Path:
        return next(self._path.parent.glob(f"{self._path.name}.regions/*/{region.hex()}"))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    path = tmp_path / "target"
    with (
        Engine("tcp") as engine,
        Provider(engine, 1, file_config(path)) as provider,
        Engine("tcp", client) as calling,
    ):
        handle = Client(calling).make_target_handle(str(engine.addr()), 1)
        yield Served(handle, provider._core.target, path)


def _mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def test_large_reads_use_the_mapping_and_small_ones_do_not(served: Served) -> None:
    data = random.Random(1).randbytes(SIZE)
    region = served.handle.create_and_write(data)
    assert served.target.view(region, 5, LEAST - 1) is None
    shown = served.target.view(region, 5, LEAST)
    assert shown is not None
    assert shown.readonly
    assert bytes(shown) == data[5 : 5 + LEAST]


def test_writes_are_visible_in_the_mapping_at_once(served: Served) -> None:
    numbers, model = random.Random(2), bytearray(SIZE)
    region = served.handle.create(SIZE)
    for _ in range(100):
        data = numbers.randbytes(numbers.choice([10, 5000, 300_000]))
        offset = numbers.randrange(SIZE - len(data))
        served.handle.write(region, offset, data)
        model[offset : offset + len(data)] = data
        start = numbers.randrange(SIZE - LEAST)
        assert served.handle.read(region, start, LEAST) == model[start : start + LEAST]
    assert served.handle.read(region, 0, SIZE) == model


def test_a_region_that_grows_and_shrinks_is_mapped_anew(served: Served) -> None:
    data = random.Random(3).randbytes(2 * SIZE)
    region = served.handle.create_and_write(data[:SIZE])
    assert served.handle.read(region, 0, SIZE) == data[:SIZE]
    served.handle.resize(region, 2 * SIZE)
    served.handle.write(region, SIZE, data[SIZE:])
    assert served.handle.read(region, 0, 2 * SIZE) == data
    served.handle.resize(region, LEAST)
    served.handle.resize(region, 2 * SIZE)
    assert served.handle.read(region, 0, 2 * SIZE) == data[:LEAST] + bytes(2 * SIZE - LEAST)


def test_uncached_data_are_not_sent_from_the_mapping(served: Served) -> None:
    """On a file system that tells, as that of the checkout does."""
    data = random.Random(4).randbytes(SIZE)
    region = served.handle.create_and_write(data, persist=True)
    with served.file(region).open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert served.target.view(region, 0, SIZE) is None
        assert served.handle.read(region, 0, SIZE) == data  # brings it there
        assert served.target.view(region, 0, SIZE) is not None


def test_a_truncated_region_file_is_damage_and_raises_no_sigbus(served: Served) -> None:
    data = random.Random(5).randbytes(SIZE)
    region = served.handle.create_and_write(data)
    assert served.handle.read(region, 0, SIZE) == data
    shown = served.target.view(region, 0, SIZE)
    assert shown is not None
    os.truncate(served.file(region), SIZE // 2)
    with pytest.raises(CorruptTarget):
        served.handle.read(region, 0, SIZE)
    assert served.handle.read(region, 0, SIZE // 2) == data[: SIZE // 2]
    # Who was about to send it just then:
    reader, writer = os.pipe()
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFAULT)):
            os.write(writer, shown[SIZE // 2 : SIZE // 2 + 100])
    finally:
        os.close(reader)
        os.close(writer)


def test_an_erased_region_is_mapped_no_longer(served: Served) -> None:
    """Its mapping would keep the room that it took."""
    region = served.handle.create_and_write(bytes(SIZE))
    served.handle.read(region, 0, SIZE)
    path = served.file(region)
    assert _mapped(path)
    served.handle.erase(region)
    served.target.commit()
    eventually(lambda: not _mapped(path))


def test_the_number_of_mapped_files_is_bounded(tmp_path: Path) -> None:
    mapped, files = CachedFiles(3), []
    try:
        for number in range(6):
            path = tmp_path / str(number)
            path.write_bytes(bytes([number]) * 10_000)
            files.append(os.open(path, os.O_RDONLY))
        for _ in range(2):
            for number, fd in enumerate(files):
                shown = mapped.show(fd, 100, 9000)
                assert shown is not None
                assert bytes(shown) == bytes([number]) * 9000
            del shown
        assert [_mapped(tmp_path / str(number)) for number in range(6)] == 3 * [False] + 3 * [True]
        assert mapped.show(files[0], 9000, 2000) is None  # beyond its end
        for fd in files:
            mapped.drop(fd)
        assert not any(_mapped(tmp_path / str(number)) for number in range(6))
    finally:
        for fd in files:
            os.close(fd)


def test_an_empty_file_is_not_mapped(tmp_path: Path) -> None:
    with (tmp_path / "empty").open("wb+") as file:
        assert CachedFiles(3).show(file.fileno(), 0, LEAST) is None
