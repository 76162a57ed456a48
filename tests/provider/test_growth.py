"""Cost of calls and memory do not grow with the number of inodes and removed names."""

from __future__ import annotations

import stat
import sys
from typing import Any

import pytest

from tests.support.helpers import open_memory
from warabi._core.attributes import ROOT
from warabi.metadata import catalogue as catalogue_module
from warabi.metadata import dentries as dentries_module
from warabi.metadata.inode import Inode
from warabi.target.config import MemoryConfig


class _Counted(dict[int, Inode]):
    """Counts the items that were looked at one by one."""

    looked = 0

    def values(self) -> Any:
        self.looked += len(self)
        return super().values()


def test_inodes_in_use_are_not_looked_at_by_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache cannot drop them, and must not try to at each step."""
    monkeypatch.setattr(catalogue_module, "_CACHED", 100)
    with open_memory(MemoryConfig()) as target:
        catalogue = target._catalogue
        catalogue._trim_at = 100
        cache = catalogue._cache = _Counted(catalogue._cache)
        regions = [target.create(1) for _ in range(1000)]
        for region in regions:
            target.namespace.pin(region.slot)
        cache.looked = 0
        for region in regions:
            target.resize(region, 2)
            target.stat(region)
        assert cache.looked < 3 * len(regions)
        for region in regions:
            target.namespace.unpin(region.slot, 1)
        target.commit()
        for _ in range(1000):
            target.create(1)
        assert len(catalogue._cache) < 2000


def test_names_that_were_removed_are_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dentries_module, "_KEPT_ABSENT", 64)
    monkeypatch.setattr(catalogue_module, "_CACHED", 512)
    with open_memory(MemoryConfig()) as target:
        names = [b"%05d" % number for number in range(5000)]
        for name in names:
            target.namespace.mknod(ROOT, name, stat.S_IFREG | 0o644, 0, 0)
        target.commit()
        full = sys.getsizeof(target._catalogue._cache)
        for name in names:
            target.namespace.unlink(ROOT, name)
        target.commit()
        assert len(target._catalogue._dentries._known) <= 64
        assert sys.getsizeof(target._catalogue._cache) < full / 4
        target.namespace.mknod(ROOT, names[0], stat.S_IFREG | 0o644, 0, 0)
        assert [name for name, _ in target.namespace.readdir(ROOT)] == [names[0]]
