"""Measures API calls, and the systems they are compared with, in interleaved rounds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import peers
from benchmarks.peers import Maker
from benchmarks.processes import Failed
from benchmarks.rows import ROWS, Row
from benchmarks.stats import MEGABYTES, RESIDENT, Round, Series, Work, measure
from benchmarks.subjects import Subject, subjects
from benchmarks.usage import resident

Progress = Callable[[str], None]


@contextlib.contextmanager
def all_peers(directory: Path, say: Progress) -> Iterator[dict[str, tuple[Maker, Maker]]]:
    """How each peer writes and reads; those that are not installed are left out."""
    with contextlib.ExitStack() as stack:
        found: dict[str, tuple[Maker, Maker]] = {peers.MEMCPY: (peers.memcpy, peers.memcpy)}
        found |= stack.enter_context(peers.echo())
        found |= stack.enter_context(peers.file(directory))
        found[peers.SHARED_MEMORY] = stack.enter_context(peers.shared())
        try:
            found[peers.REDIS] = stack.enter_context(peers.redis_server(directory))
        except Failed as error:
            say(f"without Redis: {error}")
        yield found


def _peers_of(row: Row, found: dict[str, tuple[Maker, Maker]]) -> dict[str, Callable[[], Work]]:
    """The peers that a row is compared with, made when they are called."""

    def making(maker: Maker, size: int) -> Callable[[], Work]:
        return lambda: maker(size)

    def ping(name: str) -> Callable[[], Work]:
        return making(found[name][1], 1)

    wanted: dict[str, Callable[[], Work]] = {}
    if row.moves or row.name.startswith("read "):
        for name, makers in found.items():
            if name not in peers.KERNEL.values() and (name != peers.VM_READV or row.reads):
                wanted[name] = making(makers[row.reads], row.size)
    else:
        wanted[peers.PING_UNIX] = ping(peers.COPY_UNIX)
        apart = ping(peers.COPY_UNIX)
        wanted[peers.PING_CORES] = lambda: peers.on_two_cores(apart())
        wanted[peers.PING_TCP] = ping(peers.COPY_TCP)
    if row.operation in peers.KERNEL:
        name = peers.KERNEL[row.operation]
        wanted[name] = making(found[name][0], row.size)
    return wanted


def _ours(row: Row, subject: Subject) -> Work:
    work = row.make(subject.target)
    work.pids = subject.pids
    return work


def measure_row(
    row: Row, ours: list[Subject], found: dict[str, tuple[Maker, Maker]], rounds: int, budget: float
) -> list[Series]:
    """One series for each subject and each peer."""
    works = {subject.name: _ours(row, subject) for subject in ours}
    for name, make in _peers_of(row, found).items():
        with contextlib.suppress(Failed):  # a call that is not allowed here
            works[name] = make()
    series = {name: Series(row.name, name) for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            took = measure(work, budget)
            if number:  # the first one is for warming up
                series[name].rounds.append(took)
    for subject in ours:
        for region in subject.target.list():
            subject.target.erase(region)
    return list(series.values())


def resident_series(subject: str, pids: Sequence[int]) -> Series:
    """What these processes take now."""
    megabytes = sum(resident(pid) for pid in pids) / 1e6
    return Series(RESIDENT, subject, MEGABYTES, [Round(megabytes)])


def measure_api(
    directory: Path, rounds: int, budget: float, say: Progress, rows: list[Row] | None = None
) -> list[Series]:
    """Every row.

    Args:
        directory: for files, on a disk.
        budget: seconds for a round of one subject.
    """
    done: list[Series] = []
    with subjects(directory) as ours, all_peers(directory, say) as found:
        for row in rows or ROWS:
            say(f"api: {row.name}")
            done += measure_row(row, ours, found, rounds, budget)
        for subject in ours:
            if subject.pids and subject.backend == "memory":  # the process serves the files too
                done.append(resident_series(subject.way, subject.pids))
    return done
