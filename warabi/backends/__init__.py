"""Where the bytes of regions live.  A new storage is one class and one line here."""

from __future__ import annotations

from warabi.backends.base import Storage
from warabi.backends.file import FileStorage
from warabi.backends.memory import MemoryStorage
from warabi.backends.pmem import PmemStorage

STORAGES: dict[str, type[Storage]] = {
    "memory": MemoryStorage,
    "abtio": FileStorage,
    "file": FileStorage,
    "pmem": PmemStorage,
    "pmdk": PmemStorage,
}
"""Backend names of the configuration, aliases included."""

__all__ = ["STORAGES", "FileStorage", "MemoryStorage", "PmemStorage", "Storage"]
