"""Power failures: every kind of state that a recorded workload may leave, opened and checked."""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.crash.disk import Change, Choice, Disk
from tests.crash.oracle import Oracle
from tests.crash.targets import accounted, opened
from tests.crash.trace import Event, Reader, record
from tests.crash.workload import REGION_KINDS, next_op, on_target
from tests.support.helpers import environment
from warabi.backends.xattr_times import Times
from warabi.target.target import Target
from warabi.tools import fsck

_ENUMERATED = 4
"""Up to so many pending changes all their subsets are tried."""


@dataclass
class Result:
    """What was tried."""

    points: int = 0
    states: int = 0
    repeated: int = 0


def recorded(place: Path, *commands: list[str], killed: int = 0) -> list[Event]:
    """What Python programs, one after the other, do to files below ``place/disk``.

    *killed* of them, from the first on, are expected to end themselves with SIGKILL.
    """
    root, log = place / "disk", place / "trace"
    root.mkdir(parents=True)
    events: list[Event] = []
    for number, command in enumerate(commands):
        status = -signal.SIGKILL if number < killed else 0
        record([sys.executable, *command], log, environment(), 60.0, status)
        events += Reader(root).events(log)
    return events


class Promises:
    """Follows the marks of a recorded workload with an oracle."""

    def __init__(self, seed: int) -> None:
        self.oracle = Oracle()
        self._rng = random.Random(seed)
        self.phase = ""
        self._op = next_op(random.Random(0), Oracle(), {"commit": 1})

    def hear(self, mark: str) -> None:
        word, _, rest = mark.strip().partition(" ")
        if word == "begin":
            self._op = next_op(self._rng, self.oracle, REGION_KINDS)
            self.oracle.begin(self._op)
        elif word == "end":
            told = rest.split()[1:]
            rid = bytes.fromhex(told[0]) if len(told) == 1 else None
            times = Times(int(told[0]), int(told[1])) if len(told) == 2 else None
            self.oracle.end(self._op, rid, times)
        else:
            self.phase = word
        if word == "closed":
            for key in self.oracle.now.alive:
                self.oracle.regions[key].promise(0, len(self.oracle.content(key)))
            self.oracle.floor = len(self.oracle.states) - 1

    def may_go_on(self, marks: list[str]) -> None:
        """Take in what may have happened already, without its promises."""
        self.oracle.promising = False
        for mark in marks:
            self.hear(mark)


def choices(pending: list[Change], rng: random.Random, samples: int) -> Iterator[Choice]:
    """Which of the pending changes are kept: all, none, one kind, and others."""

    def of(kept: dict[int, float]) -> Choice:
        return lambda change: kept.get(id(change), 0.0)

    if len(pending) <= _ENUMERATED:
        for bits in itertools.product((0.0, 1.0), repeat=len(pending)):
            yield of({id(c): bit for c, bit in zip(pending, bits, strict=True)})
    else:
        yield lambda change: 0.0
        yield lambda change: 1.0
        yield lambda change: float(bool(change.entries))
        yield lambda change: float(not change.entries)
        yield lambda change: float(change.data is not None)
        for one in rng.sample(pending, min(len(pending), samples)):
            yield lambda change, one=one: float(change is one)  # type: ignore[misc]
            yield lambda change, one=one: float(change is not one)  # type: ignore[misc]
    for _ in range(samples):
        share = rng.choice((0.1, 0.5, 0.9))
        kept = {id(c): rng.choice((0.0, 1.0, rng.random())) if rng.random() < 0.5
                else float(rng.random() < share) for c in pending}  # fmt: skip
        yield of(kept)


def run(
    backend: str, place: Path, scratch: Path, seed: int, operations: int, samples: int = 3,
    stride: int = 1,
) -> Result:  # fmt: skip
    """Record a workload, and check states of the medium at every *stride*-th sync of it.

    Args:
        backend: one of ``BACKENDS``.
        place: where the workload runs, an empty directory.
        scratch: where the states are made.
        seed: of the workload and of the choice of states.
        operations: of the workload.
        samples: how many states are tried at random beside those that are tried in any case.
        stride: 1 for all syncs.
    """
    path = f"{place}/disk/new/target"
    script = Path(__file__).with_name("recorded.py")
    events = recorded(place, [str(script), backend, path, str(seed), str(operations)])
    promises, disk = Promises(seed), Disk(str(place / "disk"))
    rng = random.Random(seed)
    result = Result()
    seen: set[tuple[str, int, str]] = set()
    changed, since = False, 0
    for number, event in enumerate(events):
        if event.kind == "mark":
            promises.hear(event.data.decode())
            continue
        # Before a sync most is pending, after it most is promised.
        if event.kind == "sync" and changed:
            since += 1
            changed = False
            if since % stride == 0:
                _try_all(backend, scratch, disk, promises, rng, samples, result, seen, number)
        changed |= disk.happen(event)
    _try_all(backend, scratch, disk, promises, rng, samples, result, seen, len(events))
    return result


def states(disk: Disk, scratch: Path, rng: random.Random, samples: int) -> Iterator[str]:
    """Make one state after the other in ``scratch/state``; yields a digest of each."""
    for choice in choices(disk.pending(), rng, samples):
        yield disk.rebuild(scratch / "state", choice, rng)
        shutil.rmtree(scratch / "state")


def _try_all(
    backend: str, scratch: Path, disk: Disk, promises: Promises, rng: random.Random, samples: int,
    result: Result, seen: set[tuple[str, int, str]], number: int,
) -> None:  # fmt: skip
    result.points += 1
    for digest in states(disk, scratch, rng, samples):
        known = (digest, promises.oracle.floor, promises.phase)
        if known in seen:
            result.repeated += 1
            continue
        seen.add(known)
        result.states += 1
        try:
            checked = {0: "only", 5: "repair"}.get(result.states % 10, "")
            check(backend, scratch / "state" / "new" / "target", promises, checked=checked)
        except BaseException as error:
            error.add_note(f"the power failed before event {number}, {promises.phase}")
            raise


def assert_no_damage(path: Path, *, repair: bool) -> None:
    """What a power failure leaves is no damage to fsck, which may do what opening does."""
    said: list[str] = []
    report = fsck.check(path, repair=repair, say=said.append)
    assert report.status == 0, said


def check(backend: str, path: Path, promises: Promises, *, checked: str = "") -> None:
    """Open what is left at *path*, and compare it with what was promised.

    *checked* has fsck look at it before, ``only``, or ``repair`` it.
    """
    oracle = promises.oracle
    if checked and Path(f"{path}.regions/LOCK").exists():
        assert_no_damage(path, repair=checked == "repair")
    if promises.phase == "opening" and not path.exists():
        return  # nothing was said about it yet
    # A target that was being made may be an empty file's place, or not there at all.
    with opened(backend, path, create=promises.phase == "opening") as target:
        found = on_target(target).look()
        oracle.check(found)
        _accounted(path, found.regions, target)
        for _ in range(2):  # what is found can be used
            target.erase(target.create_and_write(b"more", persist=True))
    with opened(backend, path, create=False) as target:
        again = on_target(target).look()
        assert again == found, "what was found is not what is found the next time"
        _accounted(path, found.regions, target)
        used = sum(map(len, found.regions.values()))
        assert target._catalogue.used == used, f"{target._catalogue.used} used, not {used}"


def _accounted(path: Path, regions: dict[bytes, bytes], target: Target) -> None:
    assert target.room()[2] == len(regions)
    accounted(path, target, regions)
