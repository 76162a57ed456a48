"""Commits that fail: reported and retried; changes are kept, and other rows stored."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.maintenance.test_fsck import fsck
from tests.storage.test_checksums import open_target
from tests.support.helpers import eventually, file_config
from warabi import errors
from warabi.client import Client
from warabi.engine import Engine, client
from warabi.metadata.inode import Inode
from warabi.region import RegionID
from warabi.server import Provider
from warabi.target import commit
from warabi.target.target import Target


class Faulty:
    """A catalogue's database that refuses some statements.

    Attributes:
        refuses: the exception for a statement and one of its rows, or None; a statement without
            rows comes with an empty one.
    """

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self.refuses: Callable[[str, Any], Exception | None] = lambda sql, row: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)

    def execute(self, sql: str, values: Any = ()) -> Any:
        if error := self.refuses(sql, values):
            raise error
        return self._database.execute(sql, values)

    def executemany(self, sql: str, rows: Any) -> Any:
        for row in rows:
            if error := self.refuses(sql, row):
                raise error
            self._database.execute(sql, row)


@contextlib.contextmanager
def faulty(target: Target) -> Iterator[Faulty]:
    """The database of *target*, made refuse; it refuses nothing any more at the end."""
    catalogue = target._catalogue
    made = Faulty(catalogue._db)
    parts: list[Any] = [catalogue, catalogue._journal, catalogue._dentries]
    for part in parts:
        part._db = made
    try:
        yield made
    finally:
        made.refuses = lambda sql, row: None


def rows_of(ino: int) -> Callable[[str, Any], Exception | None]:
    """Refuses the row of an inode."""

    def refuses(sql: str, row: Any) -> Exception | None:
        wanted = sql.startswith("INSERT OR REPLACE INTO inode") and row[0] == ino
        return RuntimeError("injected") if wanted else None

    return refuses


def names_called(name: bytes) -> Callable[[str, Any], Exception | None]:
    """Refuses what is done to the row of a name."""

    def refuses(sql: str, row: Any) -> Exception | None:
        return (
            RuntimeError("injected")
            if "dentry" in sql and len(row) > 1 and row[1] == name and not sql.startswith("SELECT")
            else None
        )

    return refuses


def inode_of(target: Target, region: RegionID) -> Inode:
    found = target._catalogue.region(region)
    assert found is not None
    return found


def as_killed(path: Path) -> Path:
    """A copy of an open target, which is what a kill of its process would leave."""
    copy = path.with_name("killed")
    for suffix in ("", "-wal"):
        shutil.copy(f"{path}{suffix}", f"{copy}{suffix}")
    shutil.copytree(f"{path}.regions", f"{copy}.regions")
    Path(f"{copy}.regions/LOCK").write_bytes(b"")
    return copy


def opened(path: Path) -> Target:
    """A target none of whose operations asks the database for more than names."""
    return open_target("file", path, checksums=False, packed=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "target"


def test_a_row_that_cannot_be_stored_keeps_no_other(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(path) as target, faulty(target) as database:
        names = target.namespace
        odd, other = (names.mknod(1, name, 0o644, 0, 0).region for name in (b"odd", b"other"))
        database.refuses = rows_of(odd.slot)
        target.write(other, 0, b"bytes", persist=True, extend=True)
        target.write(odd, 0, b"bytes", extend=True)
        calls: list[Callable[[], None]] = [
            lambda: target.persist(odd, 0, 5),
            lambda: target.persist(odd, 0, 5),  # is not taken for done
            lambda: target.fsync(odd),
            target.commit,
            target.sync,
        ]
        for call in calls:
            with pytest.raises(errors.StorageError, match="injected"):
                call()
            target.persist(other, 0, 5)
            target.fsync(other)
        assert sum(r.exc_info is not None for r in caplog.records) == 1
        copy = as_killed(path)
        with opened(copy) as left:
            assert [name for name, _ in left.namespace.readdir(1)] == [b"other"]
            assert left.read(other, 0, 5) == b"bytes"
        assert fsck(copy)[0] == 0
        database.refuses = lambda sql, row: None
        target.persist(odd, 0, 5)
        target.commit()
    with opened(path) as target:
        assert target.read(odd, 0, 5) == target.read(other, 0, 5) == b"bytes"
        assert {name for name, _ in target.namespace.readdir(1)} == {b"odd", b"other"}
    assert fsck(path)[0] == 0


@pytest.mark.parametrize("name", [b"odd", b"gone"])
def test_a_name_that_cannot_be_stored_keeps_no_other(path: Path, name: bytes) -> None:
    """Nor one that cannot be removed."""
    with opened(path) as target, faulty(target) as database:
        names = target.namespace
        names.mknod(1, b"gone", 0o644, 0, 0)
        target.commit()
        database.refuses = names_called(name)
        odd, other = (names.mknod(1, new, 0o644, 0, 0).region for new in (b"odd", b"other"))
        names.rename(1, b"gone", 1, b"moved")
        target.write(other, 0, b"bytes", persist=True, extend=True)
        if name == b"odd":
            with pytest.raises(errors.StorageError, match="injected"):
                target.persist(odd, 0, 0)
        with pytest.raises(errors.StorageError, match="injected"):
            target.commit()
        database.refuses = lambda sql, row: None
        target.commit()
        target.persist(odd, 0, 0)
    with opened(path) as target:
        found = {name for name, _ in target.namespace.readdir(1)}
        assert found == {b"odd", b"other", b"moved"}
    assert fsck(path)[0] == 0


@pytest.mark.parametrize("statement", ["INSERT OR REPLACE INTO inode", "COMMIT", "BEGIN"])
@pytest.mark.parametrize("error", [RuntimeError("injected"), MemoryError("injected")])
def test_a_failed_commit_fails_all_waiting_calls_and_is_retried(
    path: Path, statement: str, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(path) as target, faulty(target) as database:
        first = target.create_and_write(b"first", persist=True)
        database.refuses = lambda sql, row: error if sql.startswith(statement) else None
        regions = [target.create(0) for _ in range(4)]
        told: list[BaseException] = []

        def persist(region: RegionID) -> None:
            try:
                target.persist(region, 0, 0)
            except errors.StorageError as failure:
                told.append(failure)

        threads = [threading.Thread(target=persist, args=(region,)) for region in regions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(told) == 4
        assert all("injected" in str(failure) for failure in told)
        assert target.read(first, 0, 5) == b"first"
        target.persist(first, 0, 5)  # needs no commit
        assert [target.size(region) for region in regions] == [0] * 4
        database.refuses = lambda sql, row: None
        for region in regions:
            target.persist(region, 0, 0)
    with opened(path) as target:
        assert sorted(target.regions()) == sorted([first, *regions])
    assert fsck(path)[0] == 0
    assert sum(record.exc_info is not None for record in caplog.records) <= 4


def test_a_failed_commit_is_retried_periodically(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And what keeps failing does not fill the log."""
    monkeypatch.setattr(commit, "COMMIT_INTERVAL", 0.01)
    with opened(path) as target, faulty(target) as database:
        tries: list[str] = []

        def refuses(sql: str, row: Any) -> Exception | None:
            if sql == "COMMIT":
                tries.append(sql)
                return RuntimeError("injected")
            return None

        database.refuses = refuses
        region = target.create(0)
        eventually(lambda: len(tries) > 5)
        database.refuses = lambda sql, row: None
        with target.state.lock:
            inode = inode_of(target, region)
        eventually(lambda: target._catalogue.is_durable(inode))
    assert sum(record.exc_info is not None for record in caplog.records) == 2


def test_a_failed_commit_is_reported_over_a_connection(path: Path) -> None:
    with Engine("na+sm") as engine, Engine("na+sm", client) as other:
        provider = Provider(engine, 1, file_config(path))
        handle = Client(other).make_target_handle(str(engine.addr()), 1)
        with faulty(provider._core.target) as database:
            database.refuses = lambda sql, row: (
                RuntimeError("injected") if sql == "COMMIT" else None
            )
            with pytest.raises(errors.StorageError, match="injected"):
                handle.create_and_write(b"bytes", persist=True)
            database.refuses = lambda sql, row: None
            region = handle.create_and_write(b"bytes", persist=True)
        provider.close()
    with opened(path) as target:
        assert list(target.regions()) == [region]


def test_closing_reports_rows_that_cannot_be_stored(path: Path) -> None:
    target = opened(path)
    other = target.create_and_write(b"other")
    names = target.namespace
    odd = names.mknod(1, b"odd", 0o644, 0, 0).region
    made = Faulty(target._catalogue._db)
    target._catalogue._journal._db = made  # type: ignore[assignment]  # stands for it
    made.refuses = rows_of(odd.slot)
    with pytest.raises(errors.StorageError, match="injected"):
        target.close()
    with opened(path) as target:  # after a crash, as it were
        assert list(target.regions()) == [other]
        assert target.read(other, 0, 5) == b"other"
    assert fsck(path)[0] == 0


def test_a_failed_background_commit_fails_no_operation(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of others, that is, when there are too many in memory."""
    monkeypatch.setattr("warabi.metadata.catalogue._FLUSH_AT", 4)
    full = sqlite3.OperationalError("injected")
    with opened(path) as target, faulty(target) as database:
        database.refuses = lambda sql, row: full if "INTO inode" in sql else None
        regions = [target.create(0) for _ in range(20)]
        database.refuses = lambda sql, row: None
    with opened(path) as target:
        assert sorted(target.regions()) == sorted(regions)
