"""Locks on files: the data structure, compared with a model that knows every byte."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from warabi import errors
from warabi._core.lock_ranges import END, EXCLUSIVE, SHARED, UNLOCK, FileLock
from warabi.region import RegionID
from warabi.target import file_locks
from warabi.target.file_locks import FileLocks, LockClient, WaitingLock

A, B = RegionID(b"a" * 16), RegionID(b"b" * 16)
BYTES = 8
"""Bytes of a file in the model; the last one stands for all that follow."""


def _end(byte: int) -> int:
    return END if byte == BYTES - 1 else byte


class _Request:
    """A waiting request of the model, and the structure's."""

    def __init__(self, waiting: WaitingLock, key: Any, holder: int, kind: int, span: range) -> None:
        self.waiting = waiting
        self.key = key
        self.holder = holder
        self.kind = kind
        self.span = span


class Locks(RuleBasedStateMachine):
    """Owners of two clients with a connection each lock two files; each waits for one lock at most,
    as a process with one thread does."""

    def __init__(self) -> None:
        super().__init__()
        self.locks = FileLocks(lambda region: None)
        self.sessions = [object(), object()]
        self.clients = [
            self.locks.client(session, b"%d" % number)
            for number, session in enumerate(self.sessions)
        ]
        self.alive = [True, True]
        self.held: dict[Any, dict[int, dict[int, int]]] = {}  # key, owner, byte: kind
        self.waiting: list[_Request] = []
        self.woken: set[int] = set()

    def _client(self, holder: int) -> LockClient:
        return self.clients[holder % 2]

    def _blockers(self, key: Any, holder: int, kind: int, span: range) -> set[int]:
        return {
            owner
            for owner, held in self.held.get(key, {}).items()
            if owner != holder
            and self.alive[owner % 2]
            and any(EXCLUSIVE in (kind, held[byte]) for byte in span if byte in held)
        }

    def _set(self, key: Any, holder: int, kind: int, span: range) -> None:
        held = self.held.setdefault(key, {})
        for byte in span:
            if kind == UNLOCK:
                held.get(holder, {}).pop(byte, None)
                continue
            held.setdefault(holder, {})[byte] = kind
            for owner in held:  # what an ended client had is lost by a conflicting lock
                if not self.alive[owner % 2] and EXCLUSIVE in (kind, held[owner].get(byte, SHARED)):
                    self._lose(held[owner], kind, span)

    @staticmethod
    def _lose(held: dict[int, int], kind: int, span: range) -> None:
        for byte in span:
            held.pop(byte, None)

    def _deadlock(self, key: Any, holder: int, kind: int, span: range) -> bool:
        seen: set[int] = set()
        pending = self._blockers(key, holder, kind, span)
        while pending:
            owner = pending.pop()
            if owner == holder:
                return True
            if owner not in seen:
                seen.add(owner)
                for one in self.waiting:
                    if one.holder == owner and not one.key[1]:
                        pending |= self._blockers(one.key, one.holder, one.kind, one.span)
        return False

    def _grant(self) -> None:
        """What waits is granted in the order in which it was asked for."""
        again = True
        while again:
            again = False
            for one in list(self.waiting):
                if not self._blockers(one.key, one.holder, one.kind, one.span):
                    self.waiting.remove(one)
                    self._set(one.key, one.holder, one.kind, one.span)
                    assert one.waiting.done
                    assert one.waiting.error is None
                    assert id(one.waiting) in self.woken
                    again = True

    @rule(
        region=st.sampled_from([A, B]), flock=st.booleans(), holder=st.integers(0, 5),
        kind=st.sampled_from([SHARED, EXCLUSIVE, EXCLUSIVE, UNLOCK]),
        one=st.integers(0, BYTES - 1), two=st.integers(0, BYTES - 1), wait=st.booleans(),
    )  # fmt: skip
    def request(
        self, region: RegionID, flock: bool, holder: int, kind: int, one: int, two: int, wait: bool
    ) -> None:
        if not self.alive[holder % 2] or any(item.holder == holder for item in self.waiting):
            return
        start, last = (0, BYTES - 1) if flock else (min(one, two), max(one, two))
        span, key = range(start, last + 1), (region, flock)
        mine = self.held.get(key, {}).get(holder, {})
        if flock and kind != UNLOCK and mine and mine[0] != kind:
            self._set(key, holder, UNLOCK, span)
        blocked = kind != UNLOCK and bool(self._blockers(key, holder, kind, span))
        expected = 0
        if blocked:
            deadlock = wait and not flock and self._deadlock(key, holder, kind, span)
            expected = errno.EDEADLK if deadlock else 0 if wait else errno.EAGAIN
        box: list[WaitingLock] = []
        wake: Callable[[], None] = lambda: self.woken.update(map(id, box))  # noqa: E731
        number = 0
        try:
            found = self.locks.request(
                self._client(holder), region, flock, holder, kind, start, _end(last), 1000 + holder,
                holder + 1, wake=wake if wait else None,
            )  # fmt: skip
        except errors.PathError as error:
            number = error.errno or 0
        else:
            assert (found is not None) == (blocked and wait)
            if found is not None:
                box.append(found)
                self.waiting.append(_Request(found, key, holder, kind, span))
            else:
                self._set(key, holder, kind, span)
        assert number == expected
        self._grant()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.waiting))
        self.locks.cancel(self._client(one.holder), one.holder + 1)
        self.waiting.remove(one)
        assert one.waiting.done
        assert isinstance(one.waiting.error, errors.PathError)
        assert one.waiting.error.errno == errno.EINTR

    @rule(number=st.integers(0, 1))
    def end(self, number: int) -> None:
        if not self.alive[number]:
            return
        self.alive[number] = False
        self.locks.end(self.clients[number], self.sessions[number])
        for one in [one for one in self.waiting if one.holder % 2 == number]:
            assert isinstance(one.waiting.error, errors.ConnectionLost)
            self.waiting.remove(one)
        self._grant()

    @rule(number=st.integers(0, 1))
    def come_back(self, number: int) -> None:
        if self.alive[number]:
            return
        self.alive[number] = True
        self.sessions[number] = object()
        found = self.locks.client(self.sessions[number], b"%d" % number)
        assert found is self.clients[number]

    @invariant()
    def the_same_is_held(self) -> None:
        for region in (A, B):
            for flock in (False, True):
                held = self.held.get((region, flock), {})
                for holder in range(6):
                    for byte in range(BYTES):
                        for kind in (SHARED, EXCLUSIVE):
                            arguments = region, flock, holder, kind, byte, _end(byte)
                            assert self.locks.holds(self._client(holder), *arguments) == (
                                held.get(holder, {}).get(byte) == kind
                            )

    @invariant()
    def tests_find_what_blocks(self) -> None:
        for holder in (0, 1):
            if self.alive[holder]:
                found = self.locks.test(self.clients[holder], A, False, holder, EXCLUSIVE, 2, 4)
                blockers = self._blockers((A, False), holder, EXCLUSIVE, range(2, 5))
                assert (found is not None) == bool(blockers)
                if found is not None:
                    own = {1000 + owner for owner in blockers if owner % 2 == holder % 2}
                    assert found.pid in own or (found.pid == 0 and len(own) < len(blockers))

    @invariant()
    def nothing_waits_that_could_be_granted(self) -> None:
        for one in self.waiting:
            assert not one.waiting.done
            assert self._blockers(one.key, one.holder, one.kind, one.span)

    @invariant()
    def counts_are_right(self) -> None:
        for client in self.clients:
            ranges = sum(
                len(file.owners[owner]) for file, owners in client.files.items() for owner in owners
            )
            assert client.ranges == ranges
        assert self.locks._kept == sum(client.ranges for client in self.locks._ended)
        for file in self.locks._files.values():
            assert file.owners or file.waiting


TestLocks = Locks.TestCase
TestLocks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.fixture
def locks() -> FileLocks:
    return FileLocks(lambda region: None)


def _lock(
    locks: FileLocks, client: LockClient, start: int, end: int = -1, *, kind: int = EXCLUSIVE,
    owner: int = 0, number: int = 0, woken: list[int] | None = None,
) -> WaitingLock | None:  # fmt: skip
    wake = None if woken is None else lambda: woken.append(number)
    last = start if end < 0 else end
    return locks.request(client, A, False, owner, kind, start, last, 1, number, wake=wake)


def _refused(number: int, call: Callable[[], object]) -> None:
    with pytest.raises(errors.PathError) as caught:
        call()
    assert caught.value.errno == number


def test_ranges_of_a_client_are_limited(locks: FileLocks) -> None:
    one, other = locks.client(object()), locks.client(object())
    for at in range(file_locks.RANGES - 1):
        _lock(locks, one, 2 * at)
    _refused(errno.ENOLCK, lambda: _lock(locks, one, END))
    _lock(locks, other, END)
    _lock(locks, one, 0, END - 1, kind=UNLOCK)
    _lock(locks, one, 0, END - 1)


def test_unlocking_parts_makes_no_more_ranges_than_the_limit(locks: FileLocks) -> None:
    one = locks.client(object())
    _lock(locks, one, 0, END)
    for at in range(1, file_locks.RANGES):
        _lock(locks, one, 2 * at, kind=UNLOCK)
    _refused(errno.ENOLCK, lambda: _lock(locks, one, 1 << 40, kind=UNLOCK))
    assert one.ranges == file_locks.RANGES


def test_owners_of_a_file_are_limited(locks: FileLocks) -> None:
    one, other = locks.client(object()), locks.client(object())
    for owner in range(file_locks.OWNERS):
        _lock(locks, one, 0, kind=SHARED, owner=owner)
    _refused(errno.ENOLCK, lambda: _lock(locks, other, 0, kind=SHARED))
    _lock(locks, one, 0, kind=UNLOCK)
    _lock(locks, other, 0, kind=SHARED)


def test_waiting_requests_of_a_client_are_limited(locks: FileLocks) -> None:
    one, other, third = (locks.client(object()) for _ in range(3))
    _lock(locks, one, 0)
    woken: list[int] = []
    for owner in range(file_locks.WAITING):
        assert _lock(locks, other, 0, owner=owner, number=owner + 1, woken=woken) is not None
    _refused(errno.ENOLCK, lambda: _lock(locks, other, 0, owner=-1, number=9999, woken=woken))
    assert _lock(locks, third, 0, number=1, woken=woken) is not None
    locks.cancel(other, 1)
    assert woken == [1]
    assert _lock(locks, other, 0, owner=-1, number=9999, woken=woken) is not None


def test_locks_of_ended_clients_are_limited(locks: FileLocks) -> None:
    first = locks.client(session := object(), b"first")
    _lock(locks, first, 0)
    locks.end(first, session)
    for number in range(file_locks.SESSIONS):
        other = locks.client(session := object(), b"%d" % number)
        _lock(locks, other, number + 1)
        locks.end(other, session)
    assert len(locks._ended) == file_locks.SESSIONS
    again = locks.client(object(), b"first")
    assert not locks.holds(again, A, False, 0, EXCLUSIVE, 0, 0)
    last = locks.client(object(), b"%d" % (file_locks.SESSIONS - 1))
    assert locks.holds(last, A, False, 0, EXCLUSIVE, file_locks.SESSIONS, file_locks.SESSIONS)


def test_a_release_that_many_wait_for_is_done_in_steps(
    locks: FileLocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_locks, "_STEPS", 50)
    one, other = locks.client(object()), locks.client(object())
    _lock(locks, one, 0)
    woken: list[int] = []
    waiting = [
        _lock(locks, other, 0, kind=SHARED, owner=owner, number=owner, woken=woken)
        for owner in range(40)
    ]
    _lock(locks, one, 0, kind=UNLOCK)
    rounds = 0
    while not all(one is not None and one.done for one in waiting):
        assert woken, "nothing goes on"
        woken.clear()
        locks.settle()
        rounds += 1
    assert rounds > 3
    assert [one.error for one in waiting if one is not None] == [None] * 40


def test_a_connection_that_replaces_another_one_has_its_locks(locks: FileLocks) -> None:
    first, second = object(), object()
    client = locks.client(first, b"token")
    _lock(locks, client, 5)
    assert locks.client(second, b"token") is client
    locks.end(client, first)  # which is noticed late
    _refused(errno.EAGAIN, lambda: _lock(locks, locks.client(object()), 5))
    assert locks.holds(client, A, False, 0, EXCLUSIVE, 5, 5)


def test_what_waits_fails_when_the_target_is_closed(locks: FileLocks) -> None:
    one, other = locks.client(object()), locks.client(object())
    _lock(locks, one, 0)
    woken: list[int] = []
    waiting = _lock(locks, other, 0, number=7, woken=woken)
    locks.close()
    assert woken == [7]
    assert waiting is not None
    assert isinstance(waiting.error, errors.TargetNotFound)
    with pytest.raises(errors.TargetNotFound):
        _lock(locks, other, 0)


@pytest.mark.parametrize(
    ("kind", "start", "end"), [(3, 0, 0), (-1, 0, 0), (0, -1, 0), (0, 5, 4), (1, 0, END + 1)]
)
def test_impossible_requests_are_refused(locks: FileLocks, kind: int, start: int, end: int) -> None:
    client = locks.client(object())
    with pytest.raises(errors.OutOfBounds):
        locks.request(client, A, False, 0, kind, start, end, 0)
    with pytest.raises(errors.OutOfBounds):
        locks.test(client, A, False, 0, kind, start, end)


def test_a_lock_that_blocks_is_told_with_the_process_of_its_own_client(locks: FileLocks) -> None:
    one, other = locks.client(object()), locks.client(object())
    locks.request(one, A, False, 1, EXCLUSIVE, 3, END, 77)
    assert locks.test(one, A, False, 2, SHARED, 0, END) == FileLock(True, 3, END, 77)
    assert locks.test(other, A, False, 1, SHARED, 0, END) == FileLock(True, 3, END, 0)
