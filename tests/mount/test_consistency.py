"""What a mount shows of other clients' changes, in each mode: the table of docs/consistency.md."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount.conftest import disposable, limit_of
from tests.mount.support import (
    MIB,
    PROVIDER_ID,
    Mount,
    Provider,
    another_python,
    fails_with,
    is_mounted,
    line_of,
    mounting,
    run,
    serving,
    source_of,
    wait_until,
    watchdog,
)
from tests.mount.test_fsx import OPERATIONS, Exerciser
from tests.mount.together import BELIEVING, OPTIONS, Together, emptied, region_of, together
from tests.support.relay import Relay
from warabi import engine as warabi_engine
from warabi.client import Client
from warabi.region import RegionID
from warabifs.frontends.base import Ability
from warabifs.frontends.registry import FRONT_ENDS

TICK = 20_000_000
"""Nanoseconds that the kernel's own times may be behind the clock, and more."""


@pytest.fixture(scope="module", params=["na+sm", "tcp"])
def believing_module(request: pytest.FixtureRequest, front_end: str) -> Iterator[Together]:
    with disposable("/tmp") as path, together(request.param, path, *BELIEVING) as four:
        yield four


@pytest.fixture
def believing(request: pytest.FixtureRequest, believing_module: Together) -> Iterator[Together]:
    """Two mounts whose kernels believe all that they know for a day: what is seen before that is
    seen because they were told."""
    with emptied(believing_module, limit_of(request)) as four:
        yield four


def id_of(fd: int) -> RegionID:
    return RegionID(bytes.fromhex(os.getxattr(fd, "user.warabi.region").decode()))


@pytest.fixture
def opened(believing: Together) -> Iterator[int]:
    """An open file of the first mount, with 8 bytes that are in its page cache."""
    path = believing.first.path / "file"
    path.write_bytes(b"12345678")
    fd = os.open(path, os.O_RDWR)
    try:
        assert os.pread(fd, 100, 0) == b"12345678"
        assert os.fstat(fd).st_size == 8
        yield fd
    finally:
        os.close(fd)


def shows(fd: int, data: bytes) -> Callable[[], bool]:
    return lambda: os.pread(fd, 2 * MIB, 0) == data and os.fstat(fd).st_size == len(data)


# Files that are open here while a client or another mount changes them


def test_a_client_overwrites(believing: Together, opened: int) -> None:
    for text in (b"abcdefgh", b"ABCDEFGH"):
        believing.target.write(id_of(opened), 0, text)
        wait_until(shows(opened, text), "the client's bytes")


def test_a_client_writes_to_memory_that_it_shares_with_the_provider(believing: Together) -> None:
    path = believing.first.path / "file"
    path.write_bytes(bytes(MIB))
    with open(path, "rb", buffering=0) as file:
        region = id_of(file.fileno())
        for number in range(1, 4):
            assert os.pread(file.fileno(), 1, 0) == bytes([number - 1])
            believing.target.write(region, 0, bytes([number]) * MIB)
            wait_until(shows(file.fileno(), bytes([number]) * MIB), "the client's bytes")


def test_a_client_makes_longer_and_shorter(believing: Together, opened: int) -> None:
    region = id_of(opened)
    believing.target.resize(region, 12)
    believing.target.write(region, 8, b"more")
    wait_until(shows(opened, b"12345678more"), "the longer file")
    believing.target.resize(region, 3)
    wait_until(shows(opened, b"123"), "the shorter file")
    believing.target.resize(region, 5)
    wait_until(shows(opened, b"123\0\0"), "zeros, and not what was there before")


def test_another_mount_appends_truncates_and_replaces(believing: Together, opened: int) -> None:
    other = believing.second.path / "file"
    with open(other, "ab") as file:
        file.write(b"9")
    wait_until(shows(opened, b"123456789"), "what was appended")
    os.truncate(other, 2)
    wait_until(shows(opened, b"12"), "the truncated file")
    (believing.second.path / "new").write_bytes(b"new file")
    os.rename(believing.second.path / "new", other)
    first = believing.first.path / "file"
    wait_until(lambda: first.read_bytes() == b"new file", "the new file")
    assert os.pread(opened, 100, 0) == b"12"  # the open one is the old one
    assert os.fstat(opened).st_nlink == 0


def test_attributes_are_seen(believing: Together, opened: int) -> None:
    other = believing.second.path / "file"
    other.chmod(0o600)
    wait_until(lambda: os.fstat(opened).st_mode & 0o777 == 0o600, "the mode")
    os.utime(other, ns=(1, 2))
    wait_until(lambda: os.fstat(opened).st_mtime_ns == 2, "the time")
    os.link(other, believing.second.path / "twin")
    wait_until(lambda: os.fstat(opened).st_nlink == 2, "the link count")


def test_a_shared_mapping_shows_what_a_client_writes(believing: Together, opened: int) -> None:
    with mmap.mmap(opened, 8) as mapped:
        assert mapped[:] == b"12345678"
        believing.target.write(id_of(opened), 0, b"abcdefgh")
        wait_until(lambda: mapped[:] == b"abcdefgh", "the client's bytes")
        mapped[0:2] = b"XY"
        mapped.flush()
        assert believing.target.read(id_of(opened), 0, 8) == b"XYcdefgh"


def test_both_mounts_map_a_file_and_write_to_it(believing: Together) -> None:
    """Each page is somebody's last write: what is flushed on one side is shown on the other."""
    size = 16 * mmap.PAGESIZE
    paths = [mount.path / "file" for mount in (believing.first, believing.second)]
    paths[0].write_bytes(bytes(size))
    with open(paths[0], "r+b") as one, open(paths[1], "r+b") as two:
        maps = [mmap.mmap(file.fileno(), size) for file in (one, two)]
        try:
            for turn in range(30):
                at = turn % 16 * mmap.PAGESIZE
                mine, other = maps[turn % 2], maps[1 - turn % 2]
                mine[at] = turn + 1
                mine.flush()
                wait_until(lambda o=other, a=at, t=turn: o[a] == t + 1, "the page")  # type: ignore[misc]
        finally:
            for mapped in maps:
                mapped.close()


def test_an_erased_region_is_no_file_any_more(believing: Together, opened: int) -> None:
    path = believing.first.path / "file"
    believing.target.erase(id_of(opened))
    wait_until(lambda: not path.exists(), "the end of the name")
    for attempt in (
        lambda: os.pread(opened, 8, 0),
        lambda: os.pwrite(opened, b"x", 0),
        lambda: os.fstat(opened),
        lambda: os.fsync(opened),
    ):
        with fails_with(errno.ESTALE):
            attempt()
    assert os.listdir(believing.first.path) == []


# Names


def test_files_that_a_client_stores_are_seen(believing: Together) -> None:
    path, second = believing.first.path / "directory" / "file", b"second" * 1000
    path.parent.mkdir()
    assert not path.exists()  # the kernel believes that
    believing.target.store_name("/directory/file", b"first")
    wait_until(path.exists, "the new file")
    with open(path, "rb", buffering=0) as before:
        believing.target.store_name("/directory/file", second)
        wait_until(lambda: path.read_bytes() == second, "the file that replaced it")
        assert before.read(100) == b"first"  # it is still there
    path.write_bytes(b"changed by a mount")
    assert believing.target.fetch_name("/directory/file")[1] == b"changed by a mount"


def test_names_that_others_give_and_take_are_seen(believing: Together) -> None:
    first, second = believing.first.path, believing.second.path
    assert not (first / "name").exists()  # the kernel believes that
    (second / "name").write_bytes(b"data")
    wait_until((first / "name").exists, "the new name")
    os.rename(second / "name", second / "other")
    wait_until(lambda: not (first / "name").exists(), "the end of the old name")
    wait_until((first / "other").exists, "the new name")
    assert (first / "other").read_bytes() == b"data"
    (second / "other").unlink()
    wait_until(lambda: not (first / "other").exists(), "the end of the name")


def test_names_in_directories_that_others_move_are_seen(believing: Together) -> None:
    first, second = believing.first.path, believing.second.path
    (first / "a" / "b").mkdir(parents=True)
    (first / "a" / "b" / "file").write_bytes(b"data")
    assert (second / "a" / "b" / "file").read_bytes() == b"data"
    os.rename(first / "a", first / "moved")
    wait_until((second / "moved" / "b" / "file").exists, "the new path")
    wait_until(lambda: not (second / "a").exists(), "the end of the old path")
    os.rename(second / "moved" / "b", second / "b")
    wait_until((first / "b" / "file").exists, "the new path")
    wait_until(lambda: not (first / "moved" / "b").exists(), "the end of the old path")


def test_names_of_a_client_are_seen(believing: Together) -> None:
    path = believing.first.path / "name"
    assert not path.exists()
    regions = [believing.target.create_and_write(text) for text in (b"one", b"two")]
    believing.target.link_name(regions[0], "/name")
    wait_until(path.exists, "the name")
    assert path.read_bytes() == b"one"
    believing.target.unlink_name("/name")
    believing.target.link_name(regions[1], "/name")
    wait_until(lambda: path.exists() and path.read_bytes() == b"two", "the other region")


def test_a_region_without_a_name_is_found_though_it_was_missed_before(believing: Together) -> None:
    region = believing.target.create_and_write(b"data")
    believing.target.erase(region)
    path = believing.first.path / region.hex()
    assert not path.exists()
    other = believing.target.create_and_write(b"data")
    assert (believing.first.path / other.hex()).read_bytes() == b"data"


WORKS_IN = """
import os, sys
os.chdir(sys.argv[1])
print("there", flush=True)
for line in sys.stdin:
    print(os.getcwd(), os.listdir("."), flush=True)
"""


def test_a_lost_connection_makes_a_mount_doubt_everything(place: Path) -> None:
    """What changed while it was cut off is seen, and programs in its directories go on."""
    with serving("tcp") as provider:
        relay = Relay(provider.address)
        try:
            with (
                mounting(relay.address, place, *BELIEVING) as mount,
                warabi_engine.Engine("tcp", warabi_engine.client) as engine,
                another_python(WORKS_IN, mkdir(mount.path / "directory")) as worker,
            ):
                assert line_of(worker) == "there"
                _change_while_cut_off(provider, relay, mount, engine)
                assert worker.stdin is not None
                worker.stdin.write("\n")
                worker.stdin.flush()
                assert line_of(worker) == f"{mount.path / 'directory'} []"
        finally:
            relay.close()


def mkdir(path: Path) -> Path:
    path.mkdir()
    return path


def _change_while_cut_off(
    provider: Provider, relay: Relay, mount: Mount, engine: warabi_engine.Engine
) -> None:
    target = Client(engine).make_target_handle(provider.address, PROVIDER_ID)
    path = mount.path / "file"
    path.write_bytes(b"old data")
    region = region_of(path)
    with open(path, "rb", buffering=0) as file:
        assert os.pread(file.fileno(), 100, 0) == b"old data"
        assert not (mount.path / "later").exists()
        relay.engine = ""
        relay.cut()
        target.write(region, 0, b"new DATA")
        target.link_name(region, "/later")
        target.unlink_name("/file")
        relay.engine = provider.address
        wait_until(shows(file.fileno(), b"new DATA"), "the new bytes")
    wait_until((mount.path / "later").exists, "the new name")
    wait_until(lambda: not path.exists(), "the end of the old name")


CHURN = """
import os, sys, time
path, seed, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
deadline, count = time.monotonic() + seconds, 0
while time.monotonic() < deadline:
    count += 1
    name = f"{path}/file{(count + seed) % 7}"
    try:
        with open(name, "ab", buffering=0) as file:
            file.write(bytes(5000))
        with open(name, "rb") as file:
            file.read()
        os.rename(name, f"{path}/file{(count * seed) % 7}")
        os.listdir(path)
        if count % 5 == 0:
            os.unlink(name)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != 116:  # ESTALE: the other one replaced it in that moment
            raise
print(count)
"""


def test_mounts_that_change_the_same_names_and_files_never_wait_for_each_other(
    believing: Together,
) -> None:
    """Telling the kernel to forget must not wait for what waits for it."""
    with (
        another_python(CHURN, believing.first.path, "3", "3") as one,
        another_python(CHURN, believing.second.path, "5", "3") as two,
    ):
        assert int(line_of(one)) > 0
        assert int(line_of(two)) > 0


# Strict


def test_direct_io_shows_writes_of_another_mount_at_once(place: Path) -> None:
    with together("na+sm", place, *OPTIONS, "direct_io") as four:
        (four.first.path / "file").write_bytes(b"1234")
        with (
            open(four.first.path / "file", "r+b", buffering=0) as one,
            open(four.second.path / "file", "r+b", buffering=0) as two,
        ):
            for number in range(50):
                text = b"%04d" % number
                writer, reader = (one, two) if number % 2 else (two, one)
                os.pwrite(writer.fileno(), text, 0)
                assert os.pread(reader.fileno(), 100, 0) == text
                assert four.target.read(id_of(one.fileno()), 0, 4) == text
            os.ftruncate(one.fileno(), 2)
            assert os.pread(two.fileno(), 100, 0) == b"00"
            os.pwrite(two.fileno(), b"x" * 10, 0)
            assert os.pread(one.fileno(), 100, 0) == b"x" * 10


def test_direct_io_does_not_go_with_exclusive(place: Path) -> None:
    done = run(*Mount("memory:", place, place / "log", "direct_io", "exclusive").command(),
               check=False)  # fmt: skip
    assert done.returncode == 1
    assert "options exclusive and direct_io" in done.stderr


# Exclusive


def test_an_exclusive_mount_hands_over_at_close_sync_and_unmount(place: Path) -> None:
    with (
        serving("na+sm") as provider,
        warabi_engine.Engine("na+sm", warabi_engine.client) as engine,
        mounting(provider.address, place, *OPTIONS, "exclusive") as mount,
    ):
        target = Client(engine).make_target_handle(provider.address, PROVIDER_ID)
        path = mount.path / "file"

        def held_back() -> bool:
            """Write to a new file; whether the target does not know of it yet."""
            path.unlink(missing_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT)
            try:
                os.write(fd, b"held back")
                assert os.fstat(fd).st_size == 9
                return target.size(id_of(fd)) == 0
            finally:
                os.close(fd)

        # The kernel may write back whenever it likes, but does not do so each time at once.
        wait_until(held_back, "a write that is held back")
        assert path.read_bytes() == b"held back"
        fd = os.open(path, os.O_RDWR)
        region = id_of(fd)
        assert target.read(region, 0, 9) == b"held back"
        os.pwrite(fd, b"synced", 0)
        os.fsync(fd)
        assert target.read(region, 0, 9) == b"syncedack"
        os.pwrite(fd, b"held back", 0)
        os.fsync(fd)
        assert target.read(region, 0, 9) == b"held back"
        os.pwrite(fd, b"HELD", 0)
        os.ftruncate(fd, 6)
        os.close(fd)
        assert target.read(region, 0, target.size(region)) == b"HELD b"
        with open(path, "ab") as file:
            file.write(b"+more")
        assert target.read(region, 0, target.size(region)) == b"HELD b+more"

        with open(path, "r+b") as written, mmap.mmap(written.fileno(), 11) as mapped:
            mapped[0:4] = b"maps"
        mount.unmount()
        assert target.read(region, 0, 11) == b"maps b+more"


def test_sigterm_ends_an_exclusive_mount_in_use_with_nothing_lost(place: Path) -> None:
    source = f"file:{place}/target"
    with mounting(source, place, "exclusive") as mount:
        fd = os.open(mount.path / "file", os.O_RDWR | os.O_CREAT)
        try:
            os.write(fd, b"x" * 100_000)
            mount.signal(signal.SIGTERM)
            mount.wait()
            assert not is_mounted(mount.path)
        finally:
            with contextlib.suppress(OSError):  # the kernel may have nothing to hand over
                os.close(fd)
    with mounting(source, place) as mount:
        assert (mount.path / "file").read_bytes() == b"x" * 100_000


def test_what_an_exclusive_mount_synced_survives_kill_9(place: Path) -> None:
    source = f"file:{place}/target"
    with mounting(source, place, "exclusive") as mount:
        fd = os.open(mount.path / "file", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"synced")
        os.fsync(fd)
        os.write(fd, b" and not")
        (mount.path / "closed").write_bytes(b"closed")
        mount.kill()
        # Nothing fails where the kernel wrote those bytes before the end.
        with contextlib.suppress(OSError):
            os.close(fd)
    with mounting(source, place) as mount:
        assert (mount.path / "file").read_bytes()[:6] == b"synced"


@pytest.mark.parametrize("source", ["memory", "engine"])
def test_times_and_sizes_of_an_exclusive_mount(source: str, place: Path) -> None:
    with serving("na+sm") as provider:
        text = provider.address if source == "engine" else "memory:"
        options = OPTIONS if source == "engine" else ()
        with mounting(text, place, *options, "exclusive") as mount:
            path = mount.path / "file"
            with open(path, "wb", buffering=0) as file:
                before = os.fstat(file.fileno()).st_mtime_ns
                file.write(b"x" * 10_000)
                after = os.fstat(file.fileno())
                assert after.st_mtime_ns >= before - TICK
                assert after.st_size == path.stat().st_size == 10_000
            os.utime(path, ns=(1, 2))
            assert path.stat().st_mtime_ns == 2
            with open(path, "ab", buffering=0) as appended:
                appended.write(b"y")
            assert path.stat().st_mtime_ns > 2
            assert path.read_bytes() == b"x" * 10_000 + b"y"


def test_a_full_target_refuses_what_an_exclusive_mount_held_back(place: Path) -> None:
    target = {"type": "memory", "config": {"capacity": 100_000}}
    with (
        serving("na+sm", target) as provider,
        mounting(provider.address, place, *OPTIONS, "exclusive") as mount,
    ):
        fd = os.open(mount.path / "file", os.O_RDWR | os.O_CREAT)
        try:
            os.write(fd, bytes(200_000))  # nobody has asked the target yet
            with fails_with(errno.ENOSPC):
                os.fsync(fd)
        finally:
            os.close(fd)
        assert (mount.path / "file").stat().st_size >= 0
        assert mount.alive


@pytest.mark.parametrize("kind", ["file", "engine"])
def test_a_file_used_at_random_on_an_exclusive_mount(
    kind: str, place: Path, front_end: str
) -> None:
    allocates = Ability.FALLOCATE in FRONT_ENDS[front_end].abilities
    with (
        source_of(kind, place) as (source, options),
        mounting(source, place, *options, "exclusive") as mount,
        watchdog(mount, 100),
    ):
        exerciser = Exerciser(mount.path, 20, allocates=allocates)
        try:
            exerciser.run(OPERATIONS // 10)
        finally:
            exerciser.close()
        mount.remount()
        assert exerciser.path.read_bytes() == exerciser.model
