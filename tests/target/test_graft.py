"""A graft: all of its names at one instant or none of them, while other clients go on."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import stat
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.crash.powerloss import assert_no_damage
from tests.maintenance.test_backup import everything
from tests.maintenance.test_fsck import fsck
from tests.support.grafts import entry, listing, region
from tests.support.helpers import PATIENCE, eventually, open_memory, run_python
from tests.target.test_commits import faulty
from warabi import errors
from warabi._core.attributes import ROOT
from warabi.in_process.link import DirectLink
from warabi.provider.core import ProviderCore
from warabi.region import RegionID
from warabi.target import graft as module
from warabi.target import opening
from warabi.target.config import FileConfig, MemoryConfig
from warabi.target.graft import adopt, graft
from warabi.target.target import Target

Tree = dict[bytes, tuple[Any, ...]]
LINKS = 12  # symbolic links that are brought to the root directory


def open_at(path: Path) -> Target:
    return opening.open_file(FileConfig(path=str(path), create_if_missing=True))


@pytest.fixture(params=["memory", "file"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Target]:
    with (
        open_memory(MemoryConfig()) if request.param == "memory" else open_at(tmp_path / "target")
    ) as opened:
        yield opened


DIRECTORY, LINK = stat.S_IFDIR | 0o750, stat.S_IFLNK | 0o777


def sample(target: Target) -> bytes:
    """A listing for a target with the directory ``/there``: names in that and in the root, a
    region with two names, and two regions that have none."""
    double = region(target, b"there/sub/file", b"double", nlink=2)
    nameless = [region(target, b"", b"nameless") for _ in range(2)]
    return listing(
        entry(b"", stat.S_IFDIR | 0o711),
        *[entry(b"link %02d" % i, LINK, 100 + i, target=b"to", size=2) for i in range(LINKS)],
        entry(b"top", DIRECTORY),
        entry(b"top/deep", DIRECTORY, xattrs=[(b"user.a", b"value")]),
        entry(b"there", stat.S_IFDIR | 0o700),
        entry(b"there/sub", DIRECTORY),
        double,
        double._replace(path=b"top/deep/again"),
        *[one._replace(path=one.region.hex().encode()).changed(anonymous=1) for one in nameless],
        entry(b"there/fifo", stat.S_IFIFO | 0o600, 200),
    )  # fmt: skip


COUNT = LINKS + 8


def look(target: Target) -> Tree:
    """Every path, with what is known of it but its change time."""
    found: Tree = {}
    pending = [(b"", ROOT)]
    while pending:
        above, ino = pending.pop()
        entries, page = [], target.namespace.readdir(ino, b"", 3)
        while page:
            entries += page
            page = target.namespace.readdir(ino, page[-1][0], 3)
        assert len(dict(entries)) == len(entries)
        for name, a in entries:
            assert target.namespace.lookup(ino, name) == a
            path = above + b"/" + name
            found[path] = (a.ino, a.mode, a.nlink, a.uid, a.gid, a.size)
            if stat.S_ISDIR(a.mode):
                pending.append((path, a.ino))
    return found


def brought(found: Tree) -> int:
    """How many of the sample's names there are, other than those of nameless regions."""
    mine = (b"/link ", b"/top", b"/there/")
    return sum(path.startswith(mine) and b"theirs" not in path for path in found)


def rows(target: Target) -> tuple[list[Any], list[Any]]:
    """The inodes and names that a target has when nothing is staged."""
    assert not target._catalogue.staging
    target.commit()
    database = target._catalogue._db
    assert database.execute("SELECT 1 FROM meta WHERE key = 'joined'").fetchall() == []
    assert database.execute("SELECT 1 FROM dentry WHERE parent <= 0").fetchall() == []
    inodes = database.execute("SELECT ino, nlink, anonymous FROM inode ORDER BY ino").fetchall()
    names = database.execute("SELECT parent, name, ino FROM dentry ORDER BY parent, name")
    return inodes, names.fetchall()


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Has a function called whenever a graft, in steps of three entries, lets others come in."""

    def use(meanwhile: Callable[[], None]) -> None:
        monkeypatch.setattr(module, "_STEP", 3)
        pause = types.SimpleNamespace(sleep=lambda seconds: meanwhile())
        monkeypatch.setattr(module, "time", pause)

    return use


Between = Callable[[Callable[[], None]], None]


def prepared(target: Target) -> RegionID:
    """The listing's region, in a target that has a few names."""
    target.namespace.mkdir(ROOT, b"there", 0o755, 0, 0)
    target.namespace.symlink(ROOT, b"aside", b"x", 0, 0)
    return target.create_and_write(sample(target))


def test_all_names_at_one_instant_while_others_go_on(target: Target, between: Between) -> None:
    place = prepared(target)
    before = look(target)
    surveyed = DirectLink(ProviderCore(0, target))
    counts: list[int] = []
    joined: list[Tree] = []

    def meanwhile() -> None:
        assert not target.occupied
        assert not target.state.lock.locked()
        found = look(target)
        counts.append(brought(found))
        if not target._catalogue.joined:
            assert found == before
        else:
            named = {path: found[path] for path in found if len(path) != 33}
            joined.append(named)
            assert named == joined[0]
        there = target.namespace.lookup(ROOT, b"there").ino
        with pytest.raises(errors.PathError, match="exists"):
            target.namespace.mkdir(ROOT, b"there", 0o755, 0, 0)
        if counts[-1]:
            with pytest.raises(errors.PathError, match="not empty"):
                target.namespace.rmdir(ROOT, b"there")
        assert target.namespace.lookup(there, b"..").ino == ROOT
        for rid in target.list():
            names = target.stat(rid).names
            assert len(names) in ((2, 0) if counts[-1] else (0,)), names
        named_in_survey = [path for path in everything(surveyed) if path and len(path) != 32]
        assert len(named_in_survey) == len([path for path in found if len(path) != 33])

    between(meanwhile)
    assert graft(target, place) == COUNT
    assert counts.count(0) > 5
    assert counts.count(COUNT - 2) > 5
    assert set(counts) == {0, COUNT - 2}
    after = look(target)
    assert brought(after) == COUNT - 2
    assert len([path for path in after if len(path) == 33]) == 3  # and the listing
    assert after[b"/there/sub/file"] == after[b"/top/deep/again"]
    assert after[b"/there/sub/file"][2:] == (2, 5, 6, 6)
    there = target.namespace.lookup(ROOT, b"there")
    assert (there.nlink, there.mode) == (3, stat.S_IFDIR | 0o755)
    assert (target.namespace.getattr(ROOT).nlink, after[b"/top"][2]) == (4, 3)
    deep = target.namespace.resolve("/top/deep")
    assert (deep.mtime_ns, deep.ctime_ns) == (2, 3)
    assert target.namespace.getxattr(deep.ino, b"user.a") == b"value"
    rows(target)


def test_the_root_s_attributes_are_taken_over_where_it_is_empty(target: Target) -> None:
    root = entry(b"", stat.S_IFDIR | 0o711)
    place = adopt(target, RegionID(), 0)
    target.write(place.region, 0, listing(root, entry(b"d", DIRECTORY)), extend=True)
    assert graft(target, place.region) == 1
    found = target.namespace.getattr(ROOT)
    assert (found.mode, found.uid, found.mtime_ns, found.nlink) == (root.row.mode, 5, 2, 3)


def test_concurrent_operations_on_names_being_moved(target: Target, between: Between) -> None:
    place = prepared(target)
    names = target.namespace
    there = names.lookup(ROOT, b"there").ino
    done: list[int] = []

    def meanwhile() -> None:
        if not target._catalogue.joined or done:
            return
        done.append(1)
        names.unlink(ROOT, b"link 03")
        names.mknod(ROOT, b"link 03", 0o600, 0, 0)
        names.rename(ROOT, b"link 04", there, b"theirs")
        names.rename(ROOT, b"aside", ROOT, b"link 05")
        names.rename(ROOT, b"link 06", ROOT, b"link 07")
        names.rename(there, b"sub", ROOT, b"theirs")
        names.rename(ROOT, b"top", ROOT, b"link 08", 2)
        names.unlink(there, b"fifo")
        names.link(names.lookup(ROOT, b"link 09").ino, there, b"fifo")

    between(meanwhile)
    assert graft(target, place) == COUNT
    assert done
    found = {path: a for path, a in look(target).items() if len(path) != 33}
    kinds = {path: stat.S_IFMT(a[1]) for path, a in found.items()}
    symlinks = [b"/link %02d" % i for i in range(LINKS) if i not in (3, 4, 6, 8)]
    assert kinds == {
        **dict.fromkeys([*symlinks, b"/top", b"/there/theirs", b"/there/fifo"], stat.S_IFLNK),
        b"/link 03": stat.S_IFREG, b"/there": stat.S_IFDIR, b"/link 08": stat.S_IFDIR,
        b"/link 08/deep": stat.S_IFDIR, b"/link 08/deep/again": stat.S_IFREG,
        b"/theirs": stat.S_IFDIR, b"/theirs/file": stat.S_IFREG,
    }  # fmt: skip
    assert found[b"/link 09"][2] == 2
    assert found[b"/there"][2] == 2
    assert names.getattr(ROOT).nlink == 5
    rows(target)


def _make(target: Target) -> None:
    target.namespace.mknod(ROOT, b"link 11", 0o600, 0, 0)


def _move_into(target: Target) -> None:
    there = target.namespace.lookup(ROOT, b"there").ino
    target.namespace.rename(ROOT, b"aside", there, b"sub")


def _remove(target: Target) -> None:
    target.namespace.rmdir(ROOT, b"there")


def _erase(target: Target) -> None:
    for rid in target.list():
        if target.size(rid) == len(b"double"):
            target.erase(rid)


@pytest.mark.parametrize(
    ("theirs", "number"), [(_make, "EEXIST"), (_move_into, "EEXIST"), (_remove, "ENOENT")]
)
@pytest.mark.parametrize("after", [0, 4, 5, 7])
def test_conflicting_operations_fail_the_graft(
    target: Target, between: Between, theirs: Callable[[Target], None], number: str, after: int
) -> None:
    place = prepared(target)
    pauses = 0
    before: list[Any] = []

    def meanwhile() -> None:
        nonlocal pauses
        pauses += 1
        if pauses == after + 1:
            theirs(target)
            before.append(look(target))

    between(meanwhile)
    message = {"EEXIST": "created the name|name exists|parent directory", "ENOENT": "removed"}
    # A directory that was removed before it was come to is made.
    if theirs is _remove and pauses_before_there() > after:
        assert graft(target, place) == COUNT + 1
        return
    with pytest.raises(errors.PathError, match=f"{message[number]}|already"):
        graft(target, place)
    assert before == [look(target)]
    assert [a for a in rows(target)[1] if a[0] <= 0] == []
    assert len(rows(target)[1]) == len([path for path in before[0] if len(path) != 33])
    # Nothing of the first graft is in the way of the second.
    if theirs is _remove:
        assert graft(target, place) == COUNT + 1
    else:
        with pytest.raises(errors.PathError):
            graft(target, place)


def pauses_before_there() -> int:
    """How many steps of three entries come before the one with the directory that was there."""
    return (1 + LINKS + 2) // 3


def test_a_region_that_is_erased_meanwhile(target: Target, between: Between) -> None:
    """Before the graft is joined, or after."""
    place = prepared(target)
    erased: list[int] = []

    def meanwhile() -> None:
        if (
            not erased
            and target._catalogue._one(
                "SELECT count(*) FROM dentry WHERE name IN (X'66696c65', X'616761696e')"
            )
            == 2
        ):
            erased.append(1)
            _erase(target)

    between(meanwhile)
    assert graft(target, place) == COUNT
    assert erased
    found = look(target)
    assert brought(found) == COUNT - 4
    assert b"/there/sub" in found
    rows(target)


def test_two_grafts_at_once(target: Target, between: Between) -> None:
    """Of the same names one is made; of others, both are."""
    first = prepared(target)
    begun = threading.Barrier(2, timeout=PATIENCE)
    other = target.create_and_write(
        listing(entry(b"", DIRECTORY), *[entry(b"other %d" % i, DIRECTORY) for i in range(20)])
    )
    same = target.create_and_write(
        listing(entry(b"", DIRECTORY), entry(b"z", DIRECTORY),
                entry(b"link 01", LINK, 7, target=b"to", size=2))
    )  # fmt: skip

    def begin(place: RegionID) -> int | str:
        begun.wait()
        try:
            return graft(target, place)
        except errors.PathError as error:
            return str(error)

    between(lambda: None)
    with ThreadPoolExecutor(2) as pool:
        results = [done.result(PATIENCE) for done in [
            pool.submit(begin, place) for place in (first, other)
        ]]  # fmt: skip
    assert results == [COUNT, 20]
    with ThreadPoolExecutor(2) as pool:
        results = [done.result(PATIENCE) for done in [
            pool.submit(begin, place) for place in (same, same)
        ]]  # fmt: skip
    assert all("link 01: the name exists in the target" in str(one) for one in results)
    with pytest.raises(errors.PathError):
        target.namespace.lookup(ROOT, b"z")
    rows(target)


def test_memory_exhausted_during_a_graft() -> None:
    with open_memory(MemoryConfig(), limit=2 << 20) as target:
        entries = [entry(b"d%05d" % i, DIRECTORY) for i in range(8_000)]
        place = target.create_and_write(listing(entry(b"", DIRECTORY), *entries))
        before = rows(target)
        with pytest.raises(errors.StorageFull):
            graft(target, place)
        assert rows(target) == before
        assert target.namespace.readdir(ROOT)[0][0] == place.hex().encode()
        target.namespace.mkdir(ROOT, b"room", 0o755, 0, 0)


def test_a_disk_that_fails_during_a_graft(tmp_path: Path, between: Between) -> None:
    def refuses(sql: str, row: Any) -> Exception | None:
        failing = "INTO xattr" in sql and row
        return sqlite3.OperationalError("database or disk is full") if failing else None

    with open_at(tmp_path / "target") as target:
        place = prepared(target)
        before = rows(target)
        between(lambda: None)
        with faulty(target) as database:
            database.refuses = refuses
            with pytest.raises(errors.StorageError, match="disk is full"):
                graft(target, place)
        after = rows(target)
        # The regions that were adopted go when their connection ends.
        assert after == before
        assert brought(look(target)) == 0


def test_an_inode_that_cannot_be_stored(tmp_path: Path, between: Between) -> None:
    """Found while names are staged, the graft fails, and the next one removes them."""

    def refuses(sql: str, row: Any) -> Exception | None:
        wanted = sql.startswith("INSERT OR REPLACE INTO inode") and row and row[12] == b"to"
        return RuntimeError("injected") if wanted else None

    with open_at(tmp_path / "target") as failing:
        place = prepared(failing)
        before = look(failing)

        def commits() -> None:
            with contextlib.suppress(errors.StorageError):
                failing.commit()

        between(commits)
        with faulty(failing) as database:
            database.refuses = refuses
            with pytest.raises(errors.StorageError, match="injected"):
                graft(failing, place)
            assert failing._catalogue.staging
        assert look(failing) == before
        failing.commit()
        assert graft(failing, place) == COUNT
        assert brought(look(failing)) == COUNT - 2
        rows(failing)


def test_the_next_graft_completes_an_unfinished_one(
    target: Target, between: Between, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    place = prepared(target)
    other = target.create_and_write(listing(entry(b"", DIRECTORY), entry(b"other", DIRECTORY)))

    def failing(self: Any, *arguments: Any) -> bool:
        raise errors.StorageError("it was only a test")

    between(lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(module._Graft, "_move", failing)
        assert graft(target, place) == COUNT
    assert "stay staged" in caplog.text
    assert brought(look(target)) == COUNT - 2
    assert graft(target, other) == 1
    rows(target)
    target.namespace.unlink(ROOT, b"link 11")
    with monkeypatch.context() as patch:
        patch.setattr(module._Graft, "_remove", failing)
        with pytest.raises(errors.PathError):
            graft(target, other)  # its second entry exists, so this one is complete
            graft(target, place)
    assert target._catalogue.staging
    with pytest.raises(errors.PathError):
        graft(target, place)
    rows(target)


@pytest.mark.parametrize("pauses", [1, 4, 7])
def test_a_target_is_closed_meanwhile(tmp_path: Path, between: Between, pauses: int) -> None:
    path, left = tmp_path / "target", [pauses]
    closed = open_at(path)
    place = prepared(closed)
    before = look(closed)
    thread = threading.Thread(target=closed.close)

    def meanwhile() -> None:
        left[0] -= 1
        if not left[0]:
            thread.start()
            eventually(lambda: closed.state.closed)

    between(meanwhile)
    with pytest.raises(errors.TargetNotFound, match="graft: the target is closed"):
        graft(closed, place)
    thread.join(PATIENCE)
    assert fsck(path)[0] == 0
    with open_at(path) as again:
        assert again._catalogue.clean
        assert look(again) == before
        assert again.list() == [place]
        rows(again)


def test_a_target_is_closed_before_all_was_removed(
    tmp_path: Path, between: Between, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Any, *arguments: Any) -> bool:
        raise errors.StorageError("it was only a test")

    path = tmp_path / "target"
    with open_at(path) as closed:
        place = prepared(closed)
        before = look(closed)
        closed.namespace.mknod(ROOT, b"link 11", 0o600, 0, 0)
        between(lambda: None)
        monkeypatch.setattr(module._Graft, "_remove", failing)
        with pytest.raises(errors.PathError):
            graft(closed, place)
        closed.namespace.unlink(ROOT, b"link 11")
    assert_no_damage(path, repair=False)
    with open_at(path) as again:
        assert look(again) == before
        assert again.list() == [place]
        rows(again)


_GRAFT = """
import os, signal, sys, types
from pathlib import Path
from tests.target.test_graft import open_at, prepared
from warabi.target import graft
target = open_at(Path(sys.argv[1]))
place, left = prepared(target), int(sys.argv[2])
target.sync()
def meanwhile(seconds):
    global left
    left -= 1
    target.sync()
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
graft._STEP = 3
graft.time = types.SimpleNamespace(sleep=meanwhile)
graft.graft(target, place)
"""


@pytest.mark.parametrize("pauses", [4, 16])
def test_a_process_that_is_killed_meanwhile(tmp_path: Path, pauses: int) -> None:
    """Before the graft is joined, and after."""
    path = tmp_path / "target"
    done = run_python(_GRAFT, str(path), str(pauses))
    assert done.returncode == -9, done.stderr
    check_all_or_none(path)


def check_all_or_none(path: Path) -> int:
    """That all names are there or none, and nothing is damaged; how many."""
    assert_no_damage(path, repair=False)
    with open_at(path) as target:
        found = look(target)
        inodes, names = rows(target)
        count = brought(found)
        assert count in (0, COUNT - 2)
        nameless = [path for path in found if len(path) == 33]
        assert len(nameless) == (3 if count else 1)
        assert len(target.list()) == (4 if count else 1)
        assert target._catalogue.used == sum(map(target.size, target.list()))
        assert len(names) == len(found) - len(nameless)
        assert all(nlink or anonymous for _, nlink, anonymous in inodes)
    assert fsck(path)[0] == 0
    return count


def copy_of(path: Path, place: Path) -> Path:
    """The files of a target as they are, in the new directory *place*."""
    place.mkdir()
    for file in (path, Path(f"{path}-wal")):
        shutil.copy(file, place)
    shutil.copytree(f"{path}.regions", place / f"{path.name}.regions")
    return place / path.name


@pytest.mark.parametrize("repair", [False, True])
def test_each_moment_at_which_a_process_may_be_killed(
    tmp_path: Path, between: Between, repair: bool
) -> None:
    """Its files as they are then, opened by another, after a repair or without."""
    path, counts = tmp_path / "target", []
    with open_at(path) as killed:
        place = prepared(killed)
        killed.sync()

        def meanwhile() -> None:
            killed.commit()
            copy = copy_of(path, tmp_path / "copy")
            if repair:
                assert_no_damage(copy, repair=True)
            counts.append(check_all_or_none(copy))
            shutil.rmtree(copy.parent)

        between(meanwhile)
        assert graft(killed, place) == COUNT
    assert counts == sorted(counts)
    assert set(counts) == {0, COUNT - 2}


def test_a_region_is_persisted_with_the_directories_that_lead_to_it(tmp_path: Path) -> None:
    """It was persisted before the graft, which nobody committed."""
    path = tmp_path / "target"
    with open_at(path) as target:
        place = prepared(target)
        target.sync()
        assert graft(target, place) == COUNT
        rid = target.namespace.open_name("/top/deep/again")
        assert not target._catalogue.is_durable(target._catalogue.region(rid))  # type: ignore[arg-type]
        target.persist(rid, 0, 0)
        copied = copy_of(path, tmp_path / "copy")
        with open_at(copied) as again:
            assert again.namespace.open_name("/top/deep/again") == rid
