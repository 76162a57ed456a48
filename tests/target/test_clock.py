"""Times of inodes: coarse, and distinct for changes between which the time was read."""

from __future__ import annotations

import stat
import time

import pytest

from tests.support.helpers import open_memory
from warabi.metadata.clock import Clock
from warabi.metadata.domain import Row
from warabi.metadata.inode import Inode
from warabi.target.config import MemoryConfig
from warabi.target.target import Target


@pytest.fixture
def clock() -> Clock:
    return Clock()


def made(now: int) -> Inode:
    return Inode(Row(2, 3, stat.S_IFREG, 1, 0, 0, 0, 0, now, now, now, 0, None))


def test_unobserved_writes_share_a_time(clock: Clock) -> None:
    inode = made(clock.exact())
    times = set()
    for _ in range(1000):
        clock.wrote(inode)
        times.add(inode.mtime)
        assert inode.mtime == inode.ctime
    assert len(times) < 500  # it takes no half millisecond, but for a moment when others run


def test_an_observed_time_is_not_given_to_a_later_write(clock: Clock) -> None:
    inode = made(clock.exact())
    seen = []
    for number in range(1000):
        clock.wrote(inode)
        if number % 3:
            clock.wrote(inode)
        seen.append(inode.attributes().mtime_ns)
    assert sorted(set(seen)) == seen


def test_what_changed_later_has_no_earlier_time(clock: Clock) -> None:
    """Whether or not anybody looked at what changed before."""
    inodes = [made(clock.exact()) for _ in range(3)]
    last = 0
    for number in range(3000):
        inode = inodes[number % 3]
        if number % 7 == 0:
            inode.changed_at(clock.exact())
            inode.mtime = inode.ctime
        else:
            clock.wrote(inode)
        if number % 5 == 0:
            inode.attributes()
        assert last <= inode.mtime <= time.time_ns()
        last = inode.mtime


def test_the_change_time_increases_when_the_clock_is_set_back(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change time goes on, the others go with the clock."""
    inode = made(clock.exact())
    before = inode.attributes()
    ago = time.time_ns() - 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: ago)
    monkeypatch.setattr(time, "clock_gettime_ns", lambda clock: ago)
    changes = [before.ctime_ns]
    for _ in range(5):
        clock.wrote(inode)
        assert inode.mtime == ago
        changes.append(inode.attributes().ctime_ns)
    assert sorted(set(changes)) == changes


def test_times_that_were_set_are_replaced_by_the_next_write(clock: Clock) -> None:
    inode = made(clock.exact())
    for when in (0, 1 << 62):
        inode.changed_at(clock.exact())
        inode.mtime = when
        clock.wrote(inode)
        assert inode.mtime == inode.ctime


@pytest.fixture
def target() -> Target:
    return open_memory(MemoryConfig())


def test_each_content_that_was_seen_has_a_time_of_its_own(target: Target) -> None:
    """Clients that cache bytes rely on it: see docs/consistency.md."""
    with target:
        region = target.create(1)
        seen: dict[int, bytes] = {}
        for number in range(300):
            data = bytes([number % 251])
            target.write(region, 0, data)
            mtime = target.stat(region).mtime_ns
            assert seen.setdefault(mtime, data) == data
        assert len(seen) == 300


def test_a_file_that_says_when_it_was_written_says_it_by_a_coarse_clock(clock: Clock) -> None:
    tick = 4_000_000
    start = clock.exact() - 10 * 10**9
    inode = made(start)
    clock.file_wrote_at(inode, start + 5)
    assert inode.mtime == start + 5
    clock.file_wrote_at(inode, start + 5 - tick)  # later, within a tick
    assert start + 5 < inode.mtime < start + tick
    inode.mtime = now = clock.exact()
    clock.file_wrote_at(inode, now - tick)
    assert now < inode.mtime <= time.time_ns()
    other = made(start)
    clock.file_wrote_at(other, now - tick)  # and not before what was changed exactly
    assert now <= other.mtime <= time.time_ns()
    inode.mtime = now + 10**12  # somebody has set it
    clock.file_wrote_at(inode, now)
    assert now <= inode.mtime <= time.time_ns()
