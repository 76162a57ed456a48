"""``O_APPEND`` on several mounts of one provider: no byte is lost, and all see the same file."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mount.conftest import disposable, limit_of
from tests.mount.support import (
    MIB,
    Mount,
    Provider,
    another_python,
    line_of,
    mounting,
    python,
    serving,
    wait_until,
)
from tests.mount.together import OPTIONS, Together, emptied, region_of, together
from warabifs.frontends.base import Ability

WAYS = pytest.mark.parametrize("four_module", ["na+sm", "tcp", "direct_io"], indirect=True)


@pytest.fixture(scope="module")
def four_module(request: pytest.FixtureRequest, front_end: str) -> Iterator[Together]:
    """On the provider's host, over TCP, and past the page cache."""
    direct = request.param == "direct_io"
    with disposable("/tmp") as path:
        more = ["direct_io"] if direct else []
        with together("tcp" if direct else request.param, path, *OPTIONS, *more) as four:
            yield four


@pytest.fixture
def four(request: pytest.FixtureRequest, four_module: Together) -> Iterator[Together]:
    with emptied(four_module, limit_of(request)) as four:
        yield four


def opened_to_write(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def opened_to_read_too(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)


def set_later(path: Path) -> int:
    """The file system hears of the flag only when something is written."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
    return fd


OPENINGS = pytest.mark.parametrize(
    "opening",
    [
        opened_to_write,
        opened_to_read_too,
        pytest.param(set_later, marks=pytest.mark.needs(Ability.REQUEST_FLAGS, run=False)),
    ],
)


@contextlib.contextmanager
def appending(opening: Callable[[Path], int], *paths: Path) -> Iterator[list[int]]:
    with contextlib.ExitStack() as stack:
        fds = []
        for path in paths:
            fds.append(opening(path))
            stack.callback(os.close, fds[-1])
        yield fds


@WAYS
@OPENINGS
@pytest.mark.parametrize("size", [10, 4096, 100_000])
def test_mounts_that_take_turns_lose_nothing(
    four: Together, opening: Callable[[Path], int], size: int
) -> None:
    """Nor does a reader that has the file's pages see anything else."""
    paths = [four.first.path / "log", four.second.path / "log"]
    wanted = b""
    with appending(opening, *paths) as fds:
        for number in range(12):
            line = b"%0*d\n" % (size - 1, number)
            assert os.write(fds[number // 2 % 2], line) == size
            wanted += line
            for path in paths:
                assert path.read_bytes() == wanted
                assert path.stat().st_size == len(wanted)
    assert four.target.read(region_of(paths[0]), 0, len(wanted)) == wanted


@WAYS
@OPENINGS
def test_what_is_kept_open_for_reading_follows(
    four: Together, opening: Callable[[Path], int]
) -> None:
    """A reader that asks for no attributes finds each appended byte at its place: at once on the
    mount that appended it, as soon as it was told on the other one."""
    paths = [four.first.path / "log", four.second.path / "log"]
    wanted = b""
    with appending(opening, *paths) as fds, contextlib.ExitStack() as stack:
        readers = [stack.enter_context(open(path, "rb", buffering=0)) for path in paths]
        both = [reader.fileno() for reader in readers]
        for number in range(40):
            line = b"%03d %d\n" % (number, number % 2) * (number % 3 + 1)
            os.write(fds[number % 2], line)
            wanted += line
            if opening is not set_later:  # then the kernel is told when the write has returned
                assert os.pread(both[number % 2], 4000, 0) == wanted
            for fd in both:
                _wait_for(fd, wanted)


def _wait_for(fd: int, wanted: bytes) -> None:
    wait_until(lambda: os.pread(fd, 4000, 0) == wanted, "what was appended")


_WRITER = """
import os, sys
path, name, count = sys.argv[1:]
fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
print("ready", flush=True)
input()
for number in range(int(count)):
    line = f"{name} {number:05} ".encode().ljust(number * 7 % 90 + 20, b".") + b"\\n"
    assert os.write(fd, line) == len(line)
print("done", flush=True)
"""


@WAYS
def test_writers_everywhere_at_once_lose_nothing(four: Together) -> None:
    """Two programs on each mount, and a client."""
    paths = [four.first.path / "log", four.second.path / "log"]
    paths[0].touch()
    region, each = region_of(paths[0]), 200
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(another_python(_WRITER, paths[n % 2], f"w{n}", str(each)))
            for n in range(4)
        ]
        for writer in writers:
            assert line_of(writer) == "ready"
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
        for number in range(each):
            line = b"api %05d\n" % number
            offset = four.target.append(region, line)
            assert four.target.read(region, offset, len(line)) == line
        for writer in writers:
            assert line_of(writer) == "done"
    texts = [path.read_text() for path in paths]
    assert texts[0] == texts[1] == four.target.read(region, 0, len(texts[0])).decode()
    seen: dict[str, list[str]] = {}
    for text in texts[0].splitlines():
        name, digits, *_ = text.split()
        seen.setdefault(name, []).append(digits)
    numbers = [f"{number:05}" for number in range(each)]
    assert seen == dict.fromkeys(("w0", "w1", "w2", "w3", "api"), numbers)


@WAYS
def test_lines_stay_whole_while_another_mount_truncates(four: Together) -> None:
    paths = [four.first.path / "log", four.second.path / "log"]
    line = b"x" * 30 + b"\n"

    def append(path: Path) -> None:
        with appending(opened_to_write, path) as (fd,):
            for _ in range(200):
                os.write(fd, line)

    paths[0].touch()
    wait_until(paths[1].exists, "the file in the second mount")
    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(append, path) for path in paths * 2]
        for number in range(40):
            os.truncate(paths[number % 2], 0)
        for one in work:
            one.result(60)
    found = paths[0].read_bytes()
    assert found == line * (len(found) // len(line))
    assert paths[1].read_bytes() == found


@WAYS
def test_appends_of_more_than_a_request_holds_lose_nothing(four: Together) -> None:
    """The kernel sends them in parts, between which those of another mount may come."""
    paths = [four.first.path / "log", four.second.path / "log"]

    def append(path: Path, letter: bytes) -> None:
        with appending(opened_to_write, path) as (fd,):
            for _ in range(2):
                assert os.write(fd, letter * (3 * MIB + 5)) == 3 * MIB + 5

    with ThreadPoolExecutor(2) as pool:
        for one in [pool.submit(append, p, c) for p, c in zip(paths, (b"a", b"b"), strict=True)]:
            one.result(60)
    found = paths[0].read_bytes()
    assert Counter(found) == {ord("a"): 2 * (3 * MIB + 5), ord("b"): 2 * (3 * MIB + 5)}
    assert paths[1].read_bytes() == found


@pytest.mark.needs(Ability.DIRECT_MMAP)
@pytest.mark.parametrize("four_module", ["na+sm"], indirect=True)
def test_a_file_that_is_open_to_append_can_be_mapped(four: Together) -> None:
    """Shared, too, though its writes go past the page cache."""
    path, other = four.first.path / "log", four.second.path / "log"
    with appending(opened_to_read_too, path) as (fd,):
        os.write(fd, b"line\n" * 2000)
        with mmap.mmap(fd, 10_000) as mapped:
            assert mapped[:5] == b"line\n"
            mapped[:4] = b"LINE"
            mapped.flush()
            os.write(fd, b"more\n")
            assert mapped[9_990:] == b"line\n" * 2
    assert other.read_bytes() == b"LINE\n" + b"line\n" * 1999 + b"more\n"


@pytest.mark.needs(Ability.KEEP_PAGES, run=False)
@pytest.mark.parametrize("four_module", ["tcp"], indirect=True)
def test_the_kernel_keeps_the_pages_of_a_file_that_is_appended_to(four: Together) -> None:
    """Opening it once more to append, as a shell's ``>>`` does, drops none."""
    path = four.first.path / "log"
    path.write_bytes(b"x" * MIB)
    with open(path, "rb") as reader, mmap.mmap(reader.fileno(), MIB, prot=mmap.PROT_READ) as kept:
        assert kept[:] == b"x" * MIB
        script = """
import ctypes, mmap, sys
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 1 << 20, flags=mmap.MAP_PRIVATE)
    start = ctypes.c_char.from_buffer(mapped)
    here = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    assert not libc.mincore(ctypes.addressof(start), 1 << 20, here)
    print(here.raw[:250].count(1))
    del start
"""
        with appending(opened_to_write, path) as (fd,):
            os.write(fd, b"more")
        assert int(python(script, path)) == 250


def test_a_full_target_refuses_all_of_an_append(place: Path) -> None:
    full = {"type": "memory", "config": {"capacity": 100_000}}
    with (
        serving("na+sm", full) as provider,
        mounting(provider.address, place, *OPTIONS) as mount,
        appending(opened_to_write, mount.path / "log") as (fd,),
    ):
        os.write(fd, b"x" * 99_000)
        with pytest.raises(OSError, match="No space left"):
            os.write(fd, b"y" * 2000)
        os.write(fd, b"z" * 1000)
        assert (mount.path / "log").read_bytes() == b"x" * 99_000 + b"z" * 1000


@contextlib.contextmanager
def nearly_full(place: Path) -> Iterator[tuple[Provider, Mount, Mount]]:
    """A provider with a quota of 300,000 bytes, and two mounts of it."""
    for name in ("first", "second"):
        (place / name).mkdir()
    with (
        serving("na+sm", {"type": "memory", "config": {"capacity": 300_000}}) as provider,
        mounting(provider.address, place / "first", *OPTIONS) as first,
        mounting(provider.address, place / "second", *OPTIONS) as second,
    ):
        yield provider, first, second


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDWR | os.O_APPEND], ids=["plain", "append"])
def test_a_direct_write_that_fails_cuts_off_no_appends(place: Path, flags: int) -> None:
    """The kernel truncates then to the size that it knew, without those of another mount."""
    with (
        nearly_full(place) as (_, first, second),
        contextlib.ExitStack() as stack,
        mmap.mmap(-1, MIB) as large,
    ):
        path, other = first.path / "file", second.path / "file"
        start, lines = b"x" * mmap.PAGESIZE, b"line\n" * 100
        path.write_bytes(start)
        fd = os.open(path, flags | os.O_DIRECT)
        stack.callback(os.close, fd)
        assert os.fstat(fd).st_size == len(start)
        with appending(opened_to_write, other) as (appender,):
            os.write(appender, lines)
        with pytest.raises(OSError, match="No space left"):
            os.pwrite(fd, large, len(start))
        assert other.read_bytes() == path.read_bytes() == start + lines
        # What programs ask for is done, then as before.
        with pytest.raises(OSError, match="No space left"):
            os.pwrite(fd, large, len(start))
        os.ftruncate(fd, 100)
        assert other.stat().st_size == path.stat().st_size == 100
        os.ftruncate(fd, 100_000)
        assert os.fstat(fd).st_size == 100_000
        os.ftruncate(fd, 200)
        assert other.read_bytes() == start[:100] + bytes(100)


WRITER = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
start = os.fstat(fd).st_size
print("open", flush=True)
input()
with mmap.mmap(-1, 1 << 20) as large:
    print("writing", flush=True)
    os.pwrite(fd, large, start)
"""


def test_a_direct_write_of_a_killed_program_cuts_off_no_appends(place: Path) -> None:
    """The kernel has such a program wait for the reply, which fails here."""
    with (
        nearly_full(place) as (provider, first, second),
    ):
        path, other = first.path / "file", second.path / "file"
        start, lines = b"x" * mmap.PAGESIZE, b"line\n" * 100
        path.write_bytes(start)
        with another_python(WRITER, path) as writer:
            assert line_of(writer) == "open"
            with appending(opened_to_write, other) as (appender,):
                os.write(appender, lines)
            provider.process.send_signal(signal.SIGSTOP)
            tasks = [*Path(f"/proc/{provider.process.pid}/task").glob("*/stat")]
            try:
                wait_until(lambda: all(") T " in task.read_text() for task in tasks), "its stop")
                assert writer.stdin is not None
                print("write", file=writer.stdin, flush=True)
                assert line_of(writer) == "writing"
                state = Path(f"/proc/{writer.pid}/stat")
                wait_until(lambda: ") R " not in state.read_text(), "the write")
                writer.kill()
            finally:
                provider.process.send_signal(signal.SIGCONT)
            assert writer.wait(60) == -signal.SIGKILL
        assert other.read_bytes() == path.read_bytes() == start + lines
        os.truncate(path, 100)  # what a program asks for is done
        assert other.stat().st_size == path.stat().st_size == 100
