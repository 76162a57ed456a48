"""The parts of a target, each without those that are constructed from it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.support.helpers import PATIENCE, eventually
from warabi import errors
from warabi.backends import memory
from warabi.metadata.catalogue import Catalogue
from warabi.metadata.inode import Inode
from warabi.target.creation import Creation
from warabi.target.erasure import Erasure
from warabi.target.region_locks import RegionLocks
from warabi.target.sharing import Sharing
from warabi.target.sizes import Sizes
from warabi.target.state import TargetState


@pytest.fixture
def state() -> Iterator[TargetState]:
    catalogue = Catalogue(None)
    assert memory.BACKEND.in_memory is not None
    storage = memory.BACKEND.in_memory(None, catalogue.memory)
    yield TargetState(catalogue, storage)
    catalogue.close()
    storage.close()


def made(state: TargetState, size: int = 8, capacity: int | None = None) -> Inode:
    creation = Creation(state, Sizes(state, Sharing(state), capacity))
    with state.guard.lock, state.guard.checked:
        return creation.new_region(0o644, None, None, size, anonymous=True)


def exists(state: TargetState, inode: Inode) -> bool:
    return inode.rid in dict(state.storage.scan())


def test_regions_are_created_within_the_quota(state: TargetState) -> None:
    inode = made(state, 60, 100)
    with pytest.raises(errors.StorageFull, match="60 of 100 bytes are used"):
        made(state, 60, 100)
    sizes = Sizes(state, Sharing(state), 100)
    sizes.grow_and_fill(inode, "write", 90, memoryview(b"x" * 10))
    assert (inode.size, state.catalogue.used) == (100, 100)
    with pytest.raises(errors.StorageFull, match="write: 1 more bytes"):
        sizes.grow_and_fill(inode, "write", 100, memoryview(b"x"))


def test_calls_inside_a_region_and_those_that_exclude_others(state: TargetState) -> None:
    locks = RegionLocks(state, Erasure(state, Sharing(state)))
    inode = made(state)
    assert locks.enter(inode.rid, "read", False) is locks.enter(inode.rid, "read", False)
    with pytest.raises(errors.WouldBlock):
        locks.enter_exclusive(inode.rid, "resize", False)
    alone = threading.Event()

    def exclusive() -> None:
        locks.enter_exclusive(inode.rid, "resize", True)
        alone.set()

    thread = threading.Thread(target=exclusive)
    thread.start()
    eventually(lambda: inode.exclusive)
    locks.leave(inode)
    with pytest.raises(errors.WouldBlock):
        locks.enter(inode.rid, "read", False)
    assert not alone.is_set()
    locks.leave(inode, wrote=True)
    assert alone.wait(PATIENCE)
    thread.join(PATIENCE)
    locks.leave_exclusive(inode)
    assert locks.close()
    assert not locks.close()
    with pytest.raises(errors.TargetNotFound, match="read: the target is closed"):
        locks.enter(inode.rid, "read", True)


def test_bytes_go_when_the_last_call_leaves(state: TargetState) -> None:
    erasure = Erasure(state, Sharing(state))
    locks = RegionLocks(state, erasure)
    inode = made(state)
    locks.enter(inode.rid, "read", True)
    with state.guard.lock, state.guard.checked:
        erasure.discard(inode)
    erasure.reap()
    assert exists(state, inode)
    locks.leave(inode)
    assert not exists(state, inode)
    assert erasure.pending == 0


def test_bytes_stay_during_a_survey(state: TargetState) -> None:
    erasure = Erasure(state, Sharing(state))
    survey, inode = made(state), made(state, 70)
    with state.guard.lock, state.guard.checked:
        erasure.hold(survey.rid)
        erasure.discard(inode)
    erasure.reap()
    with state.lock:
        assert erasure.is_pending(inode.rid)
        assert erasure.kept(inode.rid) == 70
    assert exists(state, inode)
    with state.guard.lock, state.guard.checked:
        erasure.discard(survey)
    erasure.reap()
    with state.lock:
        assert erasure.kept(inode.rid) is None
    assert not exists(state, inode)
