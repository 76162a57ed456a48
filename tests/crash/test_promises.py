"""Promises of docs/durability.md: each names tests that exist, and some are tested here."""

from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path

import pytest

from tests.crash.targets import opened
from tests.crash.workload import on_target
from tests.support.helpers import ROOT, eventually, pattern
from warabi import errors
from warabi._core.tuning import COMMIT_INTERVAL
from warabi.region import RegionID
from warabi.target import commit


def test_every_promise_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "durability.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    defined = set()
    for file in (ROOT / "tests").rglob("test_*.py"):
        defined |= set(re.findall(r"^(?:async )?def (test_\w+)\(", file.read_text(), re.M))
    assert len(named) > 10
    assert named <= defined


def test_changes_are_committed_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without being asked, and what is not committed then is as if it had not been."""
    assert COMMIT_INTERVAL == 5.0
    monkeypatch.setattr(commit, "COMMIT_INTERVAL", 0.01)
    path = tmp_path / "first" / "a"
    with opened("file", path) as target:
        erased = target.create_and_write(b"erased", persist=True)
        region = target.create_and_write(b"kept")
        target.namespace.link_name(region, "/name")
        target.erase(erased)
        eventually(lambda: not target._catalogue.uncommitted and not target.erasure.pending)
        shutil.copytree(path.parent, tmp_path / "copy")
    with opened("file", tmp_path / "copy" / "a") as target:
        found = on_target(target).look()
        assert (found.regions, found.names) == ({region: b"kept"}, {"name": region})


def test_no_region_is_made_while_a_target_closes(tmp_path: Path) -> None:
    """It would be committed without its file having been synced."""
    path = tmp_path / "a"
    for seed in range(5):
        target = opened("file", path)
        made: list[RegionID] = []

        def make() -> None:
            with pytest.raises(errors.TargetNotFound):
                while True:
                    made.append(target.create_and_write(pattern(100, seed)))  # noqa: B023

        threads = [threading.Thread(target=make) for _ in range(3)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(made) > 3)  # noqa: B023
        target.close()
        for thread in threads:
            thread.join()
        with opened("file", path) as target:
            regions = on_target(target).look().regions
            assert set(regions) == set(made)
            assert set(regions.values()) == {pattern(100, seed)}
            for region in made:
                target.erase(region)


def test_a_rolled_back_transaction_is_done_again(tmp_path: Path) -> None:
    """SQLite rolls back on its own when the medium fails; nobody sees changes disappear."""
    with opened("file", tmp_path / "a") as target:
        region = target.create_and_write(b"x")
        target.namespace.link_name(region, "/name")
        target._catalogue.flush()
        target._catalogue._journal.roll_back()
        target.persist(region, 0, 1)
        assert target.namespace.open_name("/name") == region
    with opened("file", tmp_path / "a") as target:
        assert target.namespace.open_name("/name") == region
