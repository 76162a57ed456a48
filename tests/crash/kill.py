"""Rounds of work on targets that end with SIGKILL, each checked against what was promised.

Run by ``tools/crashtest``.  In a round three threads work side by side, through a client or
a mount, on regions and names of their own, until the process that serves them is killed.  The
target is then opened and compared with an oracle for each thread; the next round of its kind
goes on with what was found.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash.forkserver import Server, server
from tests.crash.oracle import Found, Oracle
from tests.crash.targets import POOL, accounted, opened
from tests.crash.workload import (
    FILE_KINDS,
    REGION_KINDS,
    FileSurface,
    Surface,
    on_handle,
    on_target,
    step,
)
from tests.support.helpers import PATIENCE, eventually, file_config, pmem_config
from warabi import errors
from warabi.client import Client
from warabi.engine import Engine, client

WAYS = (
    ("file", "client"), ("pmem", "client"), ("file", "client"), ("pmem", "client"),
    ("sync", "client"), ("file", "mount"), ("file", "client"), ("pmem", "mount"),
    ("file", "passing mount"),
)  # fmt: skip
"""Backend and way to reach it, of one round after the other.

A mount of a ``file`` target has it embedded, and is what is killed; one of a ``pmem`` target uses a
provider, and that is killed.  Past a passing mount the kernel reads and writes by itself.
"""
_WORKERS = 3


@dataclass
class Kind:
    """What lasts from one round of a kind to the next."""

    path: Path
    oracles: list[Oracle]
    rounds: int = 0


@dataclass
class Report:
    """What was done."""

    rounds: int = 0
    operations: int = 0
    regions: int = 0
    by_way: dict[str, int] = field(default_factory=dict)


class Killer:
    """Kills at a given time, and knows whether it did."""

    def __init__(self, kill: Callable[[], None]) -> None:
        self._kill = kill
        self.done = False

    def __call__(self) -> None:
        self.done = True
        self._kill()


def work(surface: Surface, oracle: Oracle, rng: random.Random, kinds: dict[str, int], prefix: str,
         killer: Killer, limit: float) -> int:  # fmt: skip
    """Operations until the other side is gone; how many."""
    deadline = time.monotonic() + limit
    for done in itertools.count():
        assert time.monotonic() < deadline, "nobody was killed"
        try:
            step(rng, oracle, kinds, surface, prefix)
        except (OSError, errors.ConnectionLost, errors.ConnectionFailed):
            if not killer.done:
                raise
            return done
    raise AssertionError


def is_mounted(path: Path) -> bool:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(path) for line in lines)


@contextlib.contextmanager
def surface_of(
    backend: str, way: str, path: Path, servers: list[Server], early: Callable[[], bool]
) -> Iterator[Surface | None]:
    """The target at *path*, served by another process; None when that did not live to serve."""
    config = pmem_config(path, create_if_missing_with_size=POOL) if backend == "pmem" else (
        file_config(path, sync=backend == "sync")
    )  # fmt: skip
    first, second = servers
    mountpoint = path.parent / f"{path.name}-mnt"
    mountpoint.mkdir(exist_ok=True)
    source, options = f"file:{path}", f"log={path.parent}/log"
    if way == "passing mount":
        options += ",passthrough"
    if way == "client" or backend != "file":
        first.start("provider", json.dumps(config))
        if early():
            yield None
            return
        source = first.line()
        options += ",provider_id=1"
    if way == "client":
        with Engine("na+sm", client) as engine, Client(engine) as connected:
            yield on_handle(connected.make_target_handle(source, 1))
        return
    mounter = first if backend == "file" else second
    try:
        mounter.start("mount", source, str(mountpoint), options)
        if backend == "file" and early():
            yield None
            return
        eventually(lambda: is_mounted(mountpoint))
        yield FileSurface(mountpoint)
    finally:
        mounter.kill()
        if is_mounted(mountpoint):
            unmount = ["fusermount3", "-u", "-z", str(mountpoint)]
            subprocess.run(unmount, timeout=PATIENCE, check=True)


def run_round(kind: Kind, backend: str, way: str, rng: random.Random, servers: list[Server]) -> int:
    """One round; how many operations were done in it."""

    def kill() -> None:
        for running in servers:  # a mount that lives on may wait for its provider
            running.kill()

    killer = Killer(kill)
    in_start = rng.random() < 0.1  # while it recovers from the round before

    def early() -> bool:
        if in_start:
            time.sleep(rng.uniform(0, 0.03))
            killer()
        return in_start

    done = [0] * _WORKERS
    failures: list[BaseException] = []
    limit = PATIENCE
    delay = rng.choice((0.01, 0.05, 0.2)) * rng.uniform(0.5, 1.5)
    seeds = [rng.getrandbits(32) for _ in range(_WORKERS)]
    with surface_of(backend, way, kind.path, servers, early) as surface:
        if surface is not None:
            kinds = REGION_KINDS if way == "client" else FILE_KINDS

            def worker(number: int) -> None:
                try:
                    done[number] = work(
                        surface, kind.oracles[number], random.Random(seeds[number]), kinds,
                        f"w{number}-", killer, limit,
                    )  # fmt: skip
                except BaseException as error:
                    failures.append(error)

            # Daemons: one that hangs in a dead mount must not keep this process from ending.
            threads = [
                threading.Thread(target=worker, args=(n,), daemon=True) for n in range(_WORKERS)
            ]
            for thread in threads:
                thread.start()
            time.sleep(delay)
            killer()
            for thread in threads:
                thread.join(2 * limit)
            hanging = sum(thread.is_alive() for thread in threads)
            assert not hanging, f"{hanging} threads hang although all servers are dead"
    if failures:
        raise failures[0]
    check(kind, backend)
    kind.rounds += 1
    return sum(done)


def check(kind: Kind, backend: str) -> None:
    """Compare a target with what its oracles may find, and let them go on from there."""
    with opened(backend, kind.path) as target:
        found = on_target(target).look()
        accounted(kind.path, target, found.regions)
        used, count = target._catalogue.used, target.room()[2]
        expected = sum(map(len, found.regions.values())), len(found.regions)
        assert (used, count) == expected, "space is lost"
    for oracle, share in zip(kind.oracles, shares(kind.oracles, found), strict=True):
        oracle.adopt(share)


def shares(oracles: list[Oracle], found: Found) -> list[Found]:
    """What is each oracle's; regions whose creation nobody saw end are whose they can be."""
    owner = {
        region.rid: number
        for number, oracle in enumerate(oracles)
        for region in oracle.regions.values()
    }
    owner.update({rid: int(name[1]) for name, rid in found.names.items()})
    strangers = [rid for rid in found.regions if rid not in owner]
    reasons = set()
    for guess in itertools.product(range(len(oracles)), repeat=len(strangers)):
        owner.update(zip(strangers, guess, strict=True))
        parts = [
            Found(
                {rid: data for rid, data in found.regions.items() if owner[rid] == number},
                {name: rid for name, rid in found.names.items() if owner[rid] == number},
                {rid: times for rid, times in found.times.items() if owner[rid] == number},
            )
            for number in range(len(oracles))
        ]
        try:
            for oracle, part in zip(oracles, parts, strict=True):
                oracle.check(part)
        except AssertionError as error:
            reasons.add(str(error))
            continue
        return parts
    raise AssertionError("; or ".join(sorted(reasons)))


def run(
    rounds: int, seed: int, place: Path, first: int = 0, tell: Callable[[str], None] = print
) -> Report:
    """*rounds* rounds; each depends on *seed*, its number, and what the ones before left."""
    report = Report()
    kinds: dict[tuple[str, str], Kind] = {}
    with server() as one, server() as other:
        for number in range(first, first + rounds):
            backend, way = WAYS[number % len(WAYS)]
            oracles = [Oracle(resident=True) for _ in range(_WORKERS)]
            path = place / f"{backend}-{way}".replace(" ", "-")
            kind = kinds.setdefault((backend, way), Kind(path, oracles))
            rng = random.Random(f"{seed}/{number}")
            try:
                operations = run_round(kind, backend, way, rng, [one, other])
            except BaseException as error:
                error.add_note(f"in round {number} of seed {seed}: {backend} through a {way}")
                raise
            report.rounds += 1
            report.operations += operations
            report.regions += sum(len(oracle.regions) for oracle in kind.oracles)
            report.by_way[f"{backend} {way}"] = report.by_way.get(f"{backend} {way}", 0) + 1
            if report.rounds % 50 == 0:
                tell(f"{report.rounds} rounds, {report.operations} operations")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/crashtest", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, help="of an earlier run, to have the same operations")
    arguments = parser.parse_args()
    seed = random.SystemRandom().getrandbits(32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="warabi-crash-") as place:
        report = run(arguments.rounds, seed, Path(place), tell=lambda text: print(text, flush=True))
    print(report)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
