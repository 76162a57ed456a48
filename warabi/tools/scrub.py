"""Comparison of all regions' data with their checksums, over any link."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from warabi._core.results import RegionStat, Verified
from warabi.errors import ConfigError, InvalidRegion
from warabi.in_process.link import Link
from warabi.metadata.checksums import BLOCK
from warabi.protocol.operations import PAGE
from warabi.region import RegionID
from warabi.target.verify import STEP


@dataclass
class Totals:
    """The results of a scrub, in blocks."""

    regions: int = 0
    verified: int = 0
    unverified: int = 0
    rotten: int = 0


@dataclass
class Rot:
    """Blocks of a region that do not match their checksums: *size* bytes at *offset*."""

    region: RegionID
    offset: int
    size: int
    names: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        names = f" ({', '.join(self.names)})" if self.names else ""
        return f"region {self.region.hex()}{names}: {self.size} bytes at {self.offset} are damaged"


def regions(link: Link) -> Iterator[RegionID]:
    """Yield every region of a target."""
    last = RegionID()
    while page := link.call("list", last, PAGE):
        yield from page
        last = page[-1]


def scrub(
    link: Link, totals: Totals, *, advance: Callable[[int], None], updating: bool = False
) -> Iterator[Rot]:
    """Verify every region, updating *totals* and yielding damaged extents.

    With *updating*, missing checksums are computed.  *advance* is called with the bytes done.

    Raises:
        ConfigError: the target has no checksums.
    """
    if not link.call("summed"):
        raise ConfigError("scrub: the target has no checksums (its setting `checksums`)")
    for region in regions(link):
        try:
            if updating:
                link.call("update", region)
            found: RegionStat = link.call("stat", region)
            yield from _scrub_region(link, region, found, totals, advance)
        except InvalidRegion:
            continue  # erased meanwhile
        totals.regions += 1


def _scrub_region(
    link: Link,
    region: RegionID,
    found: RegionStat,
    totals: Totals,
    advance: Callable[[int], None],
) -> Iterator[Rot]:
    for first in range(0, -(-found.size // BLOCK), STEP):
        seen: Verified = link.call("verify", region, first, STEP)
        totals.verified += seen.verified
        totals.unverified += seen.unverified
        totals.rotten += len(seen.rotten)
        for start, count in _runs(seen.rotten):
            offset = start * BLOCK
            yield Rot(region, offset, min(count * BLOCK, found.size - offset), found.names)
        advance(min(STEP * BLOCK, found.size - first * BLOCK))


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Yield first number and length of each run of consecutive numbers."""
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        yield found[0], len(found)
