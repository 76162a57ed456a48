"""Power failures, simulated: unsynced writes are dropped, torn and reordered.

``powerloss.py`` has the machinery, ``docs/durability.md`` the promises.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash import powerloss
from tests.crash.disk import Disk
from tests.crash.oracle import Found
from tests.crash.targets import BACKENDS, opened
from tests.crash.trace import Event, Reader
from tests.crash.workload import on_target

BEGIN = """
import os, signal, sys
from tests.crash.targets import opened
def say(text):
    os.write(1, f"{text}\\n".encode())
def die():
    os.kill(os.getpid(), signal.SIGKILL)
backend, path = sys.argv[1:]
"""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [3, 30])
def test_nothing_promised_is_lost(backend: str, seed: int, tmp_path: Path, scratch: Path) -> None:
    result = powerloss.run(backend, tmp_path, scratch, seed, 60, stride=2)
    assert result.states > 200, result


def found_after(
    backend: str, place: Path, scratch: Path, events: list[Event], samples: int
) -> Iterator[tuple[str, Found, str]]:
    """What is found in states of the medium: the last thing that was said before, what is there,
    and the target's identity."""
    disk, rng, said = Disk(str(place / "disk")), random.Random(1), ""
    for number, event in enumerate([*events, Event("sync")]):
        if event.kind == "mark":
            said = event.data.decode().strip()
        elif event.kind == "sync":
            for _ in powerloss.states(disk, scratch, rng, samples):
                path = scratch / "state" / "target"
                if number % 3 == 0 and Path(f"{path}.regions/LOCK").exists():
                    powerloss.assert_no_damage(path, repair=False)
                with opened(backend, path, create=not said) as target:
                    yield said, on_target(target).look(), target.uuid
        if event.path or event.kind != "sync":
            disk.happen(event)


@pytest.mark.parametrize("backend", ["file", "pmem"])
def test_what_a_killed_process_wrote_can_be_persisted_by_the_next(
    backend: str, tmp_path: Path, scratch: Path
) -> None:
    """It is in the page cache only, and so are the names of its files."""
    killed = f"""{BEGIN}
target = opened(backend, path)
for i in range(20):
    region = target.create_and_write(b"%04d" % i * 1000)
    target.committer.commit_catalogue()  # as a persist of another region would
    target.namespace.link_name(region, f"/{{i}}")
target.committer.commit_catalogue()
die()
"""
    after = f"""{BEGIN}
target = opened(backend, path)
region = target.namespace.open_name("/7")
target.persist(region, 0, 4000)
say("persisted")
target.close()
say("closed")
"""
    arguments = [backend, f"{tmp_path}/disk/target"]
    events = powerloss.recorded(
        tmp_path, ["-c", killed, *arguments], ["-c", after, *arguments], killed=1
    )
    tried = 0
    for said, found, _ in found_after(backend, tmp_path, scratch, events, 2):
        due = {"": [], "persisted": [7], "closed": range(20)}[said]
        for i in due:
            assert found.regions[found.names[str(i)]] == b"%04d" % i * 1000, (said, i)
        tried += bool(said)
    assert tried > 5


@pytest.mark.parametrize("backend", ["file", "pmem"])
def test_a_target_that_is_made_anew_is_the_old_one_or_the_new_one(
    backend: str, tmp_path: Path, scratch: Path
) -> None:
    """Neither without its regions, nor with changes of the old one in the new one."""
    old = f"""{BEGIN}
target = opened(backend, path)
for i in range(5):
    region = target.create_and_write(b"old%d" % i, persist=True)
    target.namespace.link_name(region, f"/{{i}}")
    target.persist(region, 0, 4)
say(f"old {{target.uuid}}")
die()
"""
    new = f"""{BEGIN}
target = opened(backend, path, override=True)
target.create_and_write(b"new", persist=True)
say("new")
die()
"""
    arguments = [backend, f"{tmp_path}/disk/target"]
    events = powerloss.recorded(
        tmp_path, ["-c", old, *arguments], ["-c", new, *arguments], killed=2
    )
    before = {str(i): b"old%d" % i for i in range(5)}
    kinds: set[str] = set()
    for said, found, uuid in found_after(backend, tmp_path, scratch, events, 4):
        content = sorted(found.regions.values())
        names = {name: found.regions[rid] for name, rid in found.names.items()}
        if said == f"old {uuid}":
            assert (names, content) == (before, sorted(before.values()))
            kinds.add("old")
        elif said.startswith("old"):
            assert (names, content) in [({}, []), ({}, [b"new"])]
            kinds.add("new")
        elif said == "new":
            assert (names, content) == ({}, [b"new"])
    assert kinds == {"old", "new"}


def test_a_graft_is_there_as_a_whole_or_not_at_all(tmp_path: Path, scratch: Path) -> None:
    """Also when what it does in steps is committed after each of them."""
    grafting = f"""{BEGIN}
import types
from tests.support.grafts import entry, listing, region
from warabi.target import graft
target = opened(backend, path)
names = [region(target, b"%d" % i, b"%04d" % i * 10) for i in range(5)]
place = target.create_and_write(listing(entry(b"", 0o40755), *names))
target.sync()
say("brought")
graft._STEP = 3
graft.time = types.SimpleNamespace(sleep=lambda seconds: target.commit())
graft.graft(target, place)
say("grafted")
target.commit()
say("durable")
die()
"""
    events = powerloss.recorded(
        tmp_path, ["-c", grafting, "file", f"{tmp_path}/disk/target"], killed=1
    )
    whole = {str(i): b"%04d" % i * 10 for i in range(5)}
    seen: set[tuple[str, int]] = set()
    for said, found, _ in found_after("file", tmp_path, scratch, events, 1):
        names = {name: found.regions[rid] for name, rid in found.names.items()}
        assert names in ({}, whole), said
        assert len(found.regions) == len(names) + bool(said) or not said
        assert names or said not in ("grafted", "durable")
        seen.add((said, len(names)))
    assert {("brought", 0), ("brought", 5), ("durable", 5)} <= seen


def test_a_descriptor_reused_before_its_close_is_traced(
    tmp_path: Path,
) -> None:
    """The kernel gives a number away while strace(1) has yet to hear that the close returned."""

    def text(name: str) -> str:
        return '"' + "".join(f"\\x{byte:02x}" for byte in name.encode()) + '"'

    log = tmp_path / "log"
    log.write_text(
        f"1 openat(AT_FDCWD, {text('/d/a')}, O_RDWR|O_CREAT, 0600) = 7\n"
        "1 close(7 <unfinished ...>\n"
        f"2 openat(AT_FDCWD, {text('/d/b')}, O_RDWR|O_CREAT, 0600) = 7\n"
        "1 <... close resumed>) = 0\n"
        f"2 pwrite64(7, {text('x')}, 1, 0) = 1\n"
        "2 fdatasync(7) = 0\n"
    )
    assert list(Reader(Path("/d")).events(log)) == [
        Event("create", "/d/a"),
        Event("create", "/d/b"),
        Event("write", "/d/b", data=b"x"),
        Event("sync", "/d/b", "data", thread=2),
        Event("synced", thread=2),
    ]


def test_the_model_of_the_disk_drops_unsynced_writes(tmp_path: Path) -> None:
    """What may be lost, and what not any more."""
    disk = Disk("/d")

    def happen(*events: Event) -> list[dict[str, bytes]]:
        for event in events:
            disk.happen(event)
        state = tmp_path / "state"
        return [
            {file.name: file.read_bytes() for file in state.iterdir()}
            for _ in powerloss.states(disk, tmp_path, random.Random(1), 0)
        ]

    x, y = b"x" * 1024, b"y" * 1024
    created = Event("create", "/d/a"), Event("write", "/d/a", data=x)
    assert happen(*created) == [{}, {}, {"a": b""}, {"a": x}]
    assert happen(Event("sync", "/d/a"), Event("synced")) == [{}, {"a": x}]
    assert happen(Event("sync", "/d"), Event("synced")) == [{"a": x}]
    new = x[:512] + y
    changed = Event("write", "/d/a", offset=512, data=y), Event("rename", "/d/a", "/d/b")
    assert happen(*changed) == [{"a": x}, {"a": new}, {"b": x}, {"b": new}]
    shorter = Event("truncate", "/d/b", size=100), Event("sync", "/d/b", "all"), Event("synced")
    assert happen(*shorter) == [{"b": new[:100]}]


def test_writes_are_torn_between_sectors_and_a_range_is_synced_alone(tmp_path: Path) -> None:
    disk = Disk("/d")
    for event in (
        Event("create", "/d/a"), Event("write", "/d/a", data=bytes(2048)),
        Event("sync", "/d", "all"), Event("synced"), Event("write", "/d/a", data=b"x" * 2048),
    ):  # fmt: skip
        disk.happen(event)

    def seen() -> set[bytes]:
        found = set()
        for seed in range(200):
            disk.rebuild(tmp_path, lambda change: 0.5, random.Random(seed))
            content = (tmp_path / "a").read_bytes()
            assert len(content) == 2048
            found.add(bytes(content[sector] for sector in range(0, 2048, 512)))
            assert all(len(set(content[s : s + 512])) == 1 for s in range(0, 2048, 512))
        return found

    assert len(seen()) == 16
    disk.happen(Event("sync", "/d/a", "range", 512, 512))
    disk.happen(Event("synced"))
    assert {sectors[1] for sectors in seen()} == {ord("x")}
    assert len(seen()) == 8


def test_what_was_persisted_in_a_pack_is_not_lost_when_it_grows_out_of_it(
    tmp_path: Path, scratch: Path
) -> None:
    """Nor when something else of the region, such as its name, is not on the medium yet."""
    script = f"""{BEGIN}
from warabi.target import commit as durability
durability.COMMIT_INTERVAL = 3600
target = opened(backend, path)
region = target.create_and_write(b"kept" * 100, persist=True)
other = target.create_and_write(b"other")
say("persisted")
target.namespace.link_name(region, "/named")
target.resize(region, 5000)
target.persist(other, 0, 5)
say("moved")
die()
"""
    arguments = ["-c", script, "file", f"{tmp_path}/disk/target"]
    events = powerloss.recorded(tmp_path, arguments, killed=1)
    moved = 0
    for said, found, _ in found_after("file", tmp_path, scratch, events, 4):
        if said:
            contents = {content[:400] for content in found.regions.values()}
            assert b"kept" * 100 in contents, (said, contents)
            moved += said == "moved"
    assert moved > 5


def test_what_was_cut_off_in_a_pack_does_not_come_back(tmp_path: Path, scratch: Path) -> None:
    """A shorter region was persisted; what it grows by later are zeros, or it has not grown."""
    script = f"""{BEGIN}
target = opened(backend, path)
region = target.create_and_write(b"x" * 4096, persist=True)
target.resize(region, 10)
target.persist(region, 0, 10)
say("cut")
target.resize(region, 3000)
say("grown")
target.write(region, 2000, b"y" * 1500, extend=True)
say("written")
die()
"""
    arguments = ["-c", script, "file", f"{tmp_path}/disk/target"]
    events = powerloss.recorded(tmp_path, arguments, killed=1)
    tried = 0
    for said, found, _ in found_after("file", tmp_path, scratch, events, 20):
        if said:
            (content,) = found.regions.values()
            assert content[:10] == b"x" * 10
            assert content[10:2000].strip(b"\0") == b"", said
            assert content[2000:].strip(b"\0y") == b"", said
            tried += len(content) > 10
    assert tried > 5


@pytest.mark.parametrize("backend", ["file", "summed"])
def test_times_that_are_kept_in_the_catalogue_are_synced(
    backend: str, tmp_path: Path, scratch: Path
) -> None:
    """As those of regions that have no file of their own, or checksums, are."""
    script = f"""{BEGIN}
target = opened(backend, path)
region = target.create_and_write(b"first", persist=True)
for number in range(3):
    target.write(region, 0, b"again")
    target.fsync(region)
    found = target.stat(region)
    say(f"{{found.mtime_ns}} {{found.ctime_ns}}")
die()
"""
    arguments = ["-c", script, backend, f"{tmp_path}/disk/target"]
    events = powerloss.recorded(tmp_path, arguments, killed=1)
    told = set()
    for said, found, _ in found_after(backend, tmp_path, scratch, events, 2):
        if said:
            due = tuple(map(int, said.split()))
            (times,) = found.times.values()
            assert times == due or times.ctime > due[1]
            told.add(said)
    assert len(told) == 3


def seen_by(disk: Disk, place: Path) -> set[bytes]:
    """What the file ``a`` may hold after a power failure."""
    return {
        (place / "state" / "a").read_bytes()
        for _ in powerloss.states(disk, place, random.Random(1), 0)
    }


def test_a_write_beyond_an_end_that_was_flushed_makes_no_file_longer(tmp_path: Path) -> None:
    disk = Disk("/d")
    for event in (
        Event("create", "/d/a"), Event("sync", "/d"), Event("synced"),
        Event("extend", "/d/a", size=9000), Event("write", "/d/a", data=b"x" * 9000),
        Event("truncate", "/d/a", size=1),
        Event("sync", "/d/a", "range", 0, 4096), Event("synced"),
    ):  # fmt: skip
        disk.happen(event)
    assert seen_by(disk, tmp_path) == {b"x"}
    disk.happen(Event("write", "/d/a", offset=6000))  # of no bytes
    assert seen_by(disk, tmp_path) == {b"x"}
    disk.happen(Event("write", "/d/a", offset=1, data=b"y" * 100))
    disk.happen(Event("truncate", "/d/a", size=1))
    disk.happen(Event("write", "/d/a", data=b"z", sync=True))
    assert seen_by(disk, tmp_path) == {b"z"}


def test_what_two_syncs_at_once_cover_is_synced_when_the_later_one_returns(tmp_path: Path) -> None:
    """Also when the other one took a part of a write, or all of it."""
    disk = Disk("/d")
    for event in (
        Event("create", "/d/a"), Event("sync", "/d"), Event("synced"),
        Event("write", "/d/a", data=b"x" * 2048), Event("sync", "/d/a", thread=1),
        Event("sync", "/d/a", "range", 512, 512, thread=2), Event("synced", thread=2),
        Event("synced", thread=1),
    ):  # fmt: skip
        disk.happen(event)
    assert seen_by(disk, tmp_path) == {b"x" * 2048}


def test_a_region_that_was_cut_off_keeps_its_size_while_its_name_waits_for_a_commit(
    tmp_path: Path, scratch: Path
) -> None:
    """Its times are committed then, and so only the range of its bytes is flushed."""
    script = f"""{BEGIN}
from warabi.target import commit
commit.COMMIT_INTERVAL = 3600
target = opened(backend, path)
region = target.create_and_write(b"x" * 9000)
target.resize(region, 1)
target.namespace.link_name(region, "/named")
target.fsync(region)
say("synced")
other = target.create_and_write(b"other", persist=True)
die()
"""
    arguments = ["-c", script, "pmem", f"{tmp_path}/disk/target"]
    events = powerloss.recorded(tmp_path, arguments, killed=1)
    assert any(event.other == "range" for event in events)
    tried = 0
    for said, found, _ in found_after("pmem", tmp_path, scratch, events, 4):
        if said:
            assert found.regions[found.names["named"]] == b"x"
            tried += 1
    assert tried > 5
