"""A catalogue that is kept elsewhere is complete there after each sync, wherever a crash cuts."""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest

from warabi.errors import ConfigError, CorruptTarget, StorageFull
from warabi.metadata import journal, schema
from warabi.metadata.catalogue import Catalogue
from warabi.metadata.replica import Replica, Store
from warabi.metadata.schema import APPLICATION_ID, SCHEMA_VERSION

DATA = Path(__file__).parent.parent / "data"
pytestmark = pytest.mark.timeout(120)


class Memory(Store):
    """Files in memory, with a copy of all of them from before each change."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.files = dict(files or {})
        self.before: list[dict[str, bytes]] = []
        self.full = False

    def _change(self) -> None:
        self.before.append(dict(self.files))
        if self.full:
            raise StorageFull("no space")

    def write(self, name: str, extents: Sequence[tuple[int, bytes]]) -> None:
        for offset, data in extents:
            middle = len(data) // 2
            for start, part in ((0, data[:middle]), (middle, data[middle:])):
                self._change()
                old = self.files.get(name, b"").ljust(offset + start, b"\0")
                self.files[name] = old[: offset + start] + part + old[offset + start + len(part) :]

    def read(self, name: str, offset: int, size: int) -> bytes | None:
        found = self.files.get(name)
        return None if found is None else found[offset : offset + size].ljust(size, b"\0")

    def size(self, name: str) -> int:
        return len(self.files.get(name, b""))

    def remove(self, name: str) -> None:
        self._change()
        self.files.pop(name, None)


def opened(store: Store, directory: Path, *, create: bool = False) -> Catalogue:
    """The catalogue in *store*, whose local files have no names any more."""
    directory.mkdir()
    replica = Replica(store, directory / "catalogue", "pool/name")
    if not replica.fetch(APPLICATION_ID, SCHEMA_VERSION):
        assert create
        schema.create(replica.file)
        replica.publish()
    catalogue = Catalogue(Path("pool/name"), "file", replica)
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()
    return catalogue


def contents(catalogue: Catalogue) -> dict[int, int]:
    """Sizes by inode."""
    catalogue.flush()
    return dict(catalogue.rows("SELECT ino, size FROM inode WHERE ino > 1"))


def test_every_cut_leaves_what_was_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_CHECKPOINT", 20)  # pages, so that there are many
    chance, store = random.Random(1), Memory()
    catalogue = opened(store, tmp_path / "first", create=True)
    synced: list[tuple[int, dict[int, int]]] = [(len(store.before), {})]
    for _ in range(60):
        for _ in range(chance.randint(1, 40)):
            inode = catalogue.add(0o100644, 0, 0, size=chance.randrange(1 << 40), anonymous=True)
        if chance.random() < 0.3:
            catalogue.resize(inode, 5)
        catalogue.sync(catalogue.commit())
        synced.append((len(store.before), contents(catalogue)))
        if catalogue.checkpoint_due:
            catalogue.checkpoint()
    catalogue.close()
    store.before.append(dict(store.files))
    assert "wal" not in store.files
    removals = sum("wal" in a and "wal" not in b for a, b in itertools.pairwise(store.before))
    restarts = sum(
        a["wal"][:32] != b["wal"][:32]
        for a, b in itertools.pairwise(store.before)
        if "wal" in a and "wal" in b
    )
    assert (removals, restarts > 5, len(store.before) > 150) == (1, True, True)
    at = 0
    for cut in range(synced[0][0], len(store.before)):
        while at + 1 < len(synced) and synced[at + 1][0] <= cut:
            at += 1
        again = opened(Memory(store.before[cut]), tmp_path / "again")
        found = contents(again)
        again.abandon()
        later = synced[min(at + 1, len(synced) - 1)][1]
        assert found in (synced[at][1], later), cut


def test_a_crash_during_recovery_is_recovered_from(tmp_path: Path) -> None:
    store = Memory()
    catalogue = opened(store, tmp_path / "first", create=True)
    for number in range(5000):
        catalogue.add(0o100644, 0, 0, size=number, anonymous=True)
    catalogue.sync(catalogue.commit())
    wanted = contents(catalogue)
    catalogue.abandon()
    assert store.size("wal") > 100_000
    again = Memory(store.files)
    opened(again, tmp_path / "again").abandon()
    assert len(again.before) > 3
    for cut in again.before:
        last = opened(Memory(cut), tmp_path / "last")
        assert contents(last) == wanted
        last.abandon()


def test_what_could_not_be_stored_is_stored_later(tmp_path: Path) -> None:
    store = Memory()
    catalogue = opened(store, tmp_path / "first", create=True)
    for round_ in range(6):
        store.full = round_ % 2 == 0
        catalogue.add(0o100644, 0, 0, size=round_, anonymous=True)
        change = catalogue.commit()
        failing = pytest.raises(StorageFull) if store.full else contextlib.nullcontext()
        with failing:
            catalogue.sync(change)
        assert catalogue.is_synced(change) != store.full
        with failing:
            catalogue.checkpoint()
    wanted = contents(catalogue)
    catalogue.abandon()
    again = opened(Memory(store.files), tmp_path / "again")
    assert contents(again) == wanted
    again.abandon()


def test_what_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    store = Memory()
    opened(store, tmp_path / "first", create=True).close()
    header = store.files["catalogue"]
    newer = header[:60] + (SCHEMA_VERSION + 1).to_bytes(4) + header[64:]
    for wrong, message in ((b"x" * 5000, "not a warabi target"), (newer, "a newer version")):
        with pytest.raises(ConfigError, match=message):
            opened(Memory({"catalogue": wrong}), tmp_path / message.replace(" ", "-"))
    damaged = header[:4096] + bytes(len(header) - 4096)
    with pytest.raises(CorruptTarget):
        opened(Memory({"catalogue": damaged}), tmp_path / "damaged")


def test_a_stored_catalogue_is_a_database(tmp_path: Path) -> None:
    store = Memory()
    catalogue = opened(store, tmp_path / "first", create=True)
    catalogue.add(0o100644, 0, 0, size=77, anonymous=True)
    catalogue.close()
    (tmp_path / "copy").write_bytes(store.files["catalogue"])
    with contextlib.closing(sqlite3.connect(tmp_path / "copy")) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("SELECT size FROM inode WHERE ino > 1").fetchall() == [(77,)]


@pytest.mark.parametrize("old", range(1, SCHEMA_VERSION))
def test_an_older_version_is_upgraded_wherever_that_is_cut(tmp_path: Path, old: int) -> None:
    store = Memory()
    replica = Replica(store, tmp_path / "old", "pool/name")
    shutil.copy(DATA / f"v{old}" / "file", replica.file)
    replica.publish()
    before = len(store.before)
    catalogue = opened(store, tmp_path / "first")
    wanted = contents(catalogue)
    assert wanted
    catalogue.close()
    for cut in (*store.before[before:], store.files):
        again = opened(Memory(cut), tmp_path / "again")
        assert contents(again) == wanted
        assert again.rows("PRAGMA user_version") == [(SCHEMA_VERSION,)]
        again.abandon()
    stored = store.files["catalogue"]
    assert int.from_bytes(stored[60:64]) == SCHEMA_VERSION
