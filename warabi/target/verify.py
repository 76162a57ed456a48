"""Operations of a target with checksums: compare blocks with their sums, make missing sums."""

from __future__ import annotations

from warabi._core.buffers import checked_size
from warabi._core.results import Verified
from warabi.backends.checksummed import SummedStorage
from warabi.errors import ConfigError
from warabi.metadata.checksums import BLOCK
from warabi.region import RegionID
from warabi.target.target import Target

__all__ = ["STEP", "Verified", "summed", "update", "verify"]

STEP = 512
"""Blocks that one request is about, 32 MiB: a sign of life, and of progress, comes that often."""


def _summed(target: Target, what: str) -> SummedStorage:
    storage = target.state.storage
    if not isinstance(storage, SummedStorage):
        raise ConfigError(f"{what}: the target has no checksums (its setting `checksums`)")
    return storage


def summed(target: Target) -> bool:
    """Whether the target has checksums."""
    return isinstance(target.state.storage, SummedStorage)


def verify(target: Target, region: RegionID, first: int, count: int) -> Verified:
    """Compare up to *count* blocks of a region, from *first* on, with their sums.

    Raises:
        ConfigError: the target has no checksums.
        InvalidRegion, OutOfBounds: the arguments.
        StorageError: the storage failed.
    """
    storage = _summed(target, "verify")
    first = checked_size(first, "verify: first")
    count = min(checked_size(count, "verify: count"), STEP)
    with target.locks.entered(region, "verify"):
        return storage.verify(region, first, count)


def update(target: Target, region: RegionID) -> None:
    """Persist a region, and sum its blocks that have no sum; raises as :func:`verify`."""
    storage = _summed(target, "update")
    with target.locks.entered(region, "update") as inode:
        for first in range(0, -(-inode.size // BLOCK), STEP):
            storage.update(region, first, STEP)
            target.committer.persist(inode, first * BLOCK, min(STEP * BLOCK, inode.size))
