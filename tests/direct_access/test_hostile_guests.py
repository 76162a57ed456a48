"""Guests that break the rules do not affect other guests."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.helpers import (
    MEMORY,
    PATIENCE,
    ROOT,
    Served,
    eventually,
    file_config,
    memories,
    open_memory,
    pattern,
    pmem_config,
    provider_process,
    python_process,
)
from warabi import errors
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, client
from warabi.region import RegionID
from warabi.server import Provider
from warabi.shm.client import Guest
from warabi.shm.layout import ENTRIES, HAZARD_SLOTS
from warabi.shm.memory import SharedMapping
from warabi.target.config import MemoryConfig

KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "memory": lambda path: MEMORY,
    "file": file_config,
    "pmem": pmem_config,
}
SECONDS = 1.5
LIFE = "0.4"
"""Seconds, after which a hostile guest is followed by another one."""
SIZES = (5, 3000, 70_000, 1 << 20)
FAULTS = (-signal.SIGSEGV, -signal.SIGBUS)
HOSTILE = str(ROOT / "tests" / "support" / "hostile.py")


@contextlib.contextmanager
def connected(served: Served, *, share: bool = True) -> Iterator[TargetHandle]:
    with Engine("na+sm", client, config={"share": share, "timeout": PATIENCE}) as engine:
        yield Client(engine).make_target_handle(served.address, 1)


class Kept:
    """Copies of the descriptors that clients of this process get."""

    def __init__(self) -> None:
        self.joined: list[int] = []
        self.granted: list[int] = []

    def named(self, name: str) -> int:
        (found,) = (fd for fd in self.joined if f"warabi-{name}" in os.readlink(_path(fd)))
        return found

    def close(self) -> None:
        for fd in self.joined + self.granted:
            os.close(fd)


def _path(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    kept = Kept()
    init, add = Guest.__init__, Guest.add

    def joining(guest: Guest, joined: Any, descriptors: Any) -> None:
        kept.joined += map(os.dup, descriptors)
        init(guest, joined, descriptors)

    def adding(guest: Guest, region: Any, granted: Any, descriptors: Any) -> None:
        kept.granted += map(os.dup, descriptors)
        add(guest, region, granted, descriptors)

    monkeypatch.setattr(Guest, "__init__", joining)
    monkeypatch.setattr(Guest, "add", adding)
    with contextlib.closing(kept):
        yield kept


@pytest.fixture
def served() -> Iterator[Served]:
    with provider_process("na+sm", MEMORY) as served:
        yield served


@pytest.fixture
def asking(served: Served) -> Iterator[TargetHandle]:
    """A client that shares nothing."""
    with connected(served, share=False) as handle:
        yield handle


@contextlib.contextmanager
def refused() -> Iterator[None]:
    with pytest.raises(OSError, match=r"Errno (1|9|13|22)\]"):  # EPERM, EBADF, EACCES, EINVAL
        yield


def try_to_write(fd: int) -> None:
    """In every way that there is, all of which must fail."""
    with refused():
        os.pwrite(fd, b"rubbish", 0)
    with refused():
        mmap.mmap(fd, mmap.PAGESIZE)
    with refused():
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0)
    for mode in (1 | 2, 0x10):  # punch a hole, zero a range
        assert _libc.fallocate(fd, mode, ctypes.c_int64(0), ctypes.c_int64(4096)) == -1
    number, found = str(os.fstat(fd).st_ino), 0
    for words in map(str.split, Path("/proc/self/maps").read_text().splitlines()):
        if words[4] == number:
            start, end = (int(word, 16) for word in words[0].split("-"))
            both, size = mmap.PROT_READ | mmap.PROT_WRITE, ctypes.c_size_t(end - start)
            assert _libc.mprotect(ctypes.c_void_p(start), size, both) == -1
            found += 1
    assert found == 1


_libc = ctypes.CDLL(None, use_errno=True)


@pytest.mark.parametrize("read_only", [False, True], ids=["writing", "reading"])
def test_shared_memory_of_the_provider_is_read_only_for_guests(
    served: Served, client_engine: Engine, kept: Kept, read_only: bool
) -> None:
    """The sign of life, which has pointers of the provider's C library, and the table."""
    maker = Client(client_engine).make_target_handle(served.address, 1)
    region = maker.create_and_write(pattern(100_000))
    reader = Client(client_engine).make_target_handle(served.address, 1, read_only=read_only)
    for _ in range(3):
        assert reader.read(region, 0, 100) == pattern(100_000)[:100]
    for name in ("life", "hazards") if read_only else ("life", "table", "write_times", "hazards"):
        fd = kept.named(name)
        again = os.open(_path(fd), os.O_RDWR | os.O_CLOEXEC)
        kept.joined.append(again)
        for each in (fd, again):
            for size in (0, 1, 1 << 30):
                with refused():
                    os.ftruncate(each, size)
            if name in ("life", "table"):
                try_to_write(each)
    if read_only:
        assert not any("warabi-write_times" in os.readlink(_path(fd)) for fd in kept.joined)


@pytest.mark.parametrize("read_only", [False, True], ids=["writing", "reading"])
def test_granted_memory_is_sealed_against_shrinking(
    served: Served, asking: TargetHandle, client_engine: Engine, kept: Kept, read_only: bool
) -> None:
    """And its provider still can make it smaller and larger, and gives back what it took."""
    region = asking.create_and_write(pattern(1 << 20))
    client_ = Client(client_engine)
    handle = client_.make_target_handle(served.address, 1, read_only=read_only)
    assert handle.read(region, 0, 1 << 20) == pattern(1 << 20)
    (fd,) = kept.granted
    kept.granted.append(os.open(_path(fd), os.O_RDWR | os.O_CLOEXEC))
    for each in kept.granted:
        for size in (0, (1 << 20) - 1):
            with refused():
                os.ftruncate(each, size)
        with refused():
            fcntl.fcntl(each, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    model = pattern(1 << 20)
    for size in (1 << 20, 300_001, 0, 5000, 2 << 20, 100_000):
        model = model[:size].ljust(size, b"\0")
        asking.resize(region, size)
        for reader in (handle, asking):
            assert reader.read(region, 0, size) == model
        model = pattern(size)
        asking.write(region, 0, model)
        assert handle.read(region, 0, size) == model
        assert sum(memories(served.process.pid).values()) <= size + mmap.PAGESIZE
    asking.resize(region, 9 << 20)  # more than is kept for the regions that the client makes next
    asking.erase(region)
    assert memories(served.process.pid) == {}
    assert os.fstat(fd).st_blocks == 0


def test_flags_of_a_guest_s_descriptor_are_its_own(
    served: Served, asking: TargetHandle, client_engine: Engine, kept: Kept
) -> None:
    """With O_APPEND pwrite(2) ignores the offset."""
    region = asking.create_and_write(pattern(100_000))
    handle = Client(client_engine).make_target_handle(served.address, 1)
    assert handle.read(region, 0, 100) == pattern(100_000)[:100]
    for fd in kept.granted:
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND | os.O_NONBLOCK)
    asking.write(region, 5, b"here")
    assert asking.read(region, 0, 10) == pattern(100_000)[:5] + b"here" + pattern(100_000)[9:10]


def test_memory_that_a_guest_made_longer_can_be_resized() -> None:
    with open_memory(MemoryConfig()) as target:
        joined = target.sharing.join()
        assert joined is not None
        guest, _ = joined
        region = target.create_and_write(pattern(100_000))
        granted = target.grant(region, guest.number, writable=True)
        assert granted is not None
        os.ftruncate(granted.place.fd, 1 << 30)
        os.pwrite(granted.place.fd, b"behind the end", 100_000)
        target.resize(region, 200_000)
        assert target.read(region, 0, 200_000) == pattern(100_000) + bytes(100_000)
        target.write(region, 200_000, pattern(1000), extend=True)
        target.resize(region, 150_000)
        target.resize(region, 1 << 31)
        assert target.read(region, 140_000, 100_000) == bytes(100_000)
        os.close(granted.place.fd)
        target.erase(region)
        target.sharing.leave(guest)


def test_impossible_write_times(engine: Engine, tmp_path: Path) -> None:
    """Any number becomes a time that is not to come, and is stored."""
    config = file_config(tmp_path / "target")
    with Provider(engine, 1, config) as provider:
        target = provider._core.target
        region = target.create_and_write(pattern(100_000))
        joined = target.sharing.join()
        assert joined is not None
        guest, grants = joined
        granted = target.grant(region, guest.number, writable=True)
        assert granted is not None
        os.close(granted.place.fd)
        changed = target.stat(region).ctime_ns
        mapping = SharedMapping(grants.write_times.fd, 8 * ENTRIES, writable=True)
        with mapping.view.cast("Q") as write_times:
            for mark in (1, 2, 1 << 31, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 0):
                write_times[granted.index] = mark
                write_times[0] = mark
                target.sharing.look()
                found = target.stat(region)
                assert 0 <= found.mtime_ns <= time.time_ns()
                assert changed < found.ctime_ns <= time.time_ns()
                changed = found.ctime_ns
                target.sync()
        target.sharing.leave(guest)
    with Provider(engine, 2, config) as provider:
        found = provider._core.target.stat(region)
        assert (found.mtime_ns, found.ctime_ns) == (0, changed)


def test_garbage_in_the_hazard_slots(
    served: Served, asking: TargetHandle, client_engine: Engine, kept: Kept
) -> None:
    """A guest that says that it is touching everything keeps the memory of regions from others, as
    long as it is there, and nothing else."""
    handle = Client(client_engine).make_target_handle(served.address, 1)
    regions = [asking.create_and_write(pattern(9 << 20, seed)) for seed in range(3)]
    for region in regions:
        assert handle.read(region, 0, 9 << 20)
    mapping = SharedMapping(kept.named("hazards"), 8 * HAZARD_SLOTS, writable=True)
    with mapping.view.cast("Q") as slots:
        for slot in range(8, HAZARD_SLOTS):  # those below are used by the accesses of this process
            slots[slot] = (0, 1, 2, 3, 1 << 20, 1 << 63, (1 << 64) - 1)[slot % 7]
        asking.resize(regions[0], 1 << 20)
        assert asking.read(regions[0], 0, 1 << 20) == pattern(9 << 20)[: 1 << 20]
        assert handle.read(regions[0], 0, 1 << 20) == pattern(9 << 20)[: 1 << 20]
        for region in regions:
            asking.erase(region)
        assert 0 < sum(memories(served.process.pid).values()) <= 28 << 20
        client_engine.finalize()
        eventually(lambda: memories(served.process.pid) == {})
    region = asking.create_and_write(pattern(1 << 20))
    assert asking.read(region, 0, 1 << 20) == pattern(1 << 20)


@pytest.mark.parametrize("forced", ["0", "1"], ids=["msync", "libpmem"])
def test_a_file_that_is_cut_off_while_it_is_persisted(
    tmp_path: Path, kept: Kept, forced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The provider maps it, to flush a part of it."""
    monkeypatch.setenv("PMEM_IS_PMEM_FORCE", forced)
    size, over = 4 << 20, threading.Event()

    def cut(fd: int) -> None:
        while not over.is_set():
            os.ftruncate(fd, 0)
            os.ftruncate(fd, size)
            time.sleep(0.0005)

    with (
        provider_process("na+sm", pmem_config(tmp_path / "target")) as served,
        connected(served) as handle,
        connected(served, share=False) as asking,
    ):
        region = asking.create_and_write(pattern(size), persist=True)
        assert handle.read(region, 0, size) == pattern(size)
        thread = threading.Thread(target=cut, args=kept.granted)
        thread.start()
        persisted = 0
        try:
            for _ in range(100):
                with contextlib.suppress(errors.StorageError, errors.CorruptTarget):
                    asking.persist(region, 0, size)
                    persisted += 1
        finally:
            over.set()
            thread.join()
        assert persisted
        asking.erase(region)
        region = asking.create_and_write(pattern(size), persist=True)
        assert asking.read(region, 0, size) == pattern(size)


class Honest:
    """A client that writes and reads regions of its own, and reads those of others.

    Args:
        asking: a client that always asks the provider, and must find the same.
        theirs: regions that others may do anything to.
    """

    def __init__(self, handle: TargetHandle, asking: TargetHandle, theirs: list[RegionID]) -> None:
        self.handle = handle
        self.asking = asking
        self.theirs = theirs
        self.regions = [(handle.create_and_write(pattern(size)), size, 0) for size in SIZES]
        self.turns = 0

    def turn(self) -> None:
        self.turns += 1
        for each, (region, size, seed) in enumerate(self.regions):
            for reader in (self.handle, self.asking):
                assert reader.read(region, 0, size) == pattern(size, seed)
            writer = self.handle if self.turns % 3 else self.asking
            if self.turns % 20 == each:
                writer.erase(region)
                region = writer.create_and_write(pattern(size))
            elif self.turns % 20 == 10 + each:
                writer.resize(region, size // 2)
                assert self.handle.read(region, 0, size // 2) == pattern(size, seed)[: size // 2]
                writer.resize(region, size)
                tail = self.asking.read(region, size // 2, size - size // 2)
                assert tail == bytes(size - size // 2)
            seed = self.turns % 50
            writer.write(region, 0, pattern(size, seed), persist=not self.turns % 7)
            assert self.asking.size(region) == size
            self.regions[each] = (region, size, seed)
        for region in self.theirs:
            for reader in (self.handle, self.asking):
                with contextlib.suppress(errors.Exception):
                    reader.read(region, 0, 60_000)
            with contextlib.suppress(errors.Exception):
                self.handle.write(region, 0, bytes(1000))


@pytest.mark.parametrize("kind", KINDS)
def test_other_guests_are_not_affected(kind: str, tmp_path: Path) -> None:
    """One hostile guest may only read, another may write to regions of its own."""
    with provider_process("na+sm", KINDS[kind](tmp_path / "target")) as served:
        with connected(served) as handle, connected(served, share=False) as asking:
            theirs = [asking.create_and_write(pattern(size)) for size in (100_000, 300_000)]
            honest = Honest(handle, asking, theirs)
            of_all = [region for region, _, _ in honest.regions] + theirs
            end = time.monotonic() + SECONDS
            seed = 0
            with contextlib.ExitStack() as stack:
                guests: list[Any] = [None, None]
                while time.monotonic() < end:
                    for each, regions in enumerate((theirs, of_all)):
                        if guests[each] is None or (ended := guests[each].poll()) is not None:
                            # It was granted what it asked for, and then nobody killed it.
                            assert guests[each] is None or ended in (0, *FAULTS)
                            seed += 1
                            words = ",".join(region.hex() for region in regions)
                            arguments = (HOSTILE, served.address, str(each), str(seed), LIFE, words)
                            guests[each] = stack.enter_context(python_process(*arguments))
                    for _ in range(5):
                        honest.turn()
                        of_all[:] = [region for region, _, _ in honest.regions] + theirs
                assert served.process.poll() is None
            for _ in range(25):
                honest.turn()
            for region in theirs:
                asking.erase(region)
            with connected(served) as new:
                region = new.create_and_write(pattern(300_000))
                assert asking.read(region, 0, 300_000) == pattern(300_000)
                assert new.read(region, 0, 300_000) == pattern(300_000)
                served.stop()
                try:  # without the provider
                    assert new.read(region, 0, 300_000) == pattern(300_000)
                finally:
                    served.signal(signal.SIGCONT)
        served.signal(signal.SIGTERM)
        assert served.process.wait(PATIENCE) == 0


@pytest.mark.parametrize("ending", ["close", "pause"])
def test_the_last_guest_leaves_while_the_target_waits_for_it(engine: Engine, ending: str) -> None:
    """It was in the middle of an access, or said so."""
    with Provider(engine, 1, MEMORY) as provider:
        target = provider._core.target
        region = target.create_and_write(pattern(100_000))
        joined = target.sharing.join()
        assert joined is not None
        guest, _ = joined
        granted = target.grant(region, guest.number, writable=True)
        assert granted is not None
        os.close(granted.place.fd)
        guest.hazards.view[0] = granted.index
        timer = threading.Timer(0.1, target.sharing.leave, (guest,))
        timer.start()
        began = time.monotonic()
        if ending == "close":
            provider.close()
        else:
            target.sharing.pause()
        assert time.monotonic() - began > 0.05
        timer.join()
        target.sharing.leave(guest)  # a second time is none
