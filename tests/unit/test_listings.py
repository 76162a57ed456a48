"""Positions in directory listings, and how long they stay valid."""

from __future__ import annotations

import random

from warabifs.fs.handles import Listing, Listings


def read(listing: Listing, directory: list[bytes], part: int, taken: int) -> list[bytes]:
    """A whole listing as the kernel reads it: it asks for *part* entries and takes fewer."""
    found: list[bytes] = []
    start = 0
    while True:
        after = listing.names[start - 1] if start else b""
        page = [name for name in sorted(directory) if name > after][:part]
        if not page:
            return found
        positions = listing.place(page, start)
        assert [listing.names[position] for position in positions] == page
        found += page[:taken]
        start = positions[:taken][-1] + 1


def test_a_directory_that_does_not_change_needs_no_dictionary() -> None:
    """Which would take time and memory: parts that overlap, and further passes, go without."""
    listing, directory = Listing(), [b"%04d" % number for number in range(1000)]
    for part, taken in ((128, 100), (50, 50), (300, 7)):
        assert read(listing, directory, part, taken) == directory
        assert listing.in_order
    assert listing.names == directory


def test_positions_mean_one_name_whatever_changes() -> None:
    chosen = random.Random(5)
    listing, directory = Listing(), [b"%04d" % number for number in range(300)]
    known: dict[int, bytes] = {}
    for step in range(30):
        assert read(listing, directory, 40, chosen.randrange(1, 41)) == sorted(directory)
        for position, name in enumerate(listing.names):
            assert known.setdefault(position, name) == name
        assert len(set(listing.names)) == len(listing.names)
        for name in chosen.sample(directory, 20):
            directory.remove(name)
        directory += [b"%04d.%d" % (chosen.randrange(300), step) for _ in range(20)]
        directory = [*dict.fromkeys(directory)]


def test_openings_share_a_listing_that_outlives_them_within_bounds() -> None:
    listings = Listings(spare=100)
    one, two = listings.open(5), listings.open(5)
    assert one is two
    one.place([b"%02d" % number for number in range(60)], 0)
    listings.close(5, one)
    listings.close(5, two)
    assert listings.open(5) is one
    listings.close(5, one)
    other = listings.open(6)
    other.place([b"%02d" % number for number in range(60)], 0)
    listings.close(6, other)
    assert listings.open(6) is other  # the latest one
    assert listings.open(5) is not one
    listings.forget(6)
    assert listings.open(6) is not other


def test_names_that_are_gone_are_forgotten_when_they_are_too_many() -> None:
    listings = Listings(spare=100)
    listing = listings.open(5)
    kept = listings.open(5)
    listing.length = 10
    for number in range(12):
        listing.place([b"%d.%d" % (number, each) for each in range(10)], 10 * number)
        assert listings.begin(5, listing) is listing
    listing.place([b"more"], 120)
    fresh = listings.begin(5, listing)
    assert fresh is not listing
    assert not fresh.names
    assert kept.names[120] == b"more"  # to those that go on
    listings.close(5, kept)
    assert listings.open(5) is fresh


def test_what_the_kernel_has_read_of_a_listing() -> None:
    """It is dropped when others change the directory: at once, or at the end if not complete."""
    listings = Listings(spare=100)
    listing = listings.open(5)
    assert not listing.change()  # nothing has been read
    listing.read = listing.version
    assert not listing.change()
    assert not listing.end()
    listing.read = listing.version
    assert listing.end()
    assert listing.change()
    assert not listing.change()  # no more than once
    assert not listing.end()  # the replies under way during the change
    listing.read = listing.version
    assert listing.end()
    listings.close(5, listing)
    assert listing.change()
    assert listing.read is None


def test_cookies_of_a_listing_are_not_those_of_the_one_before() -> None:
    listings = Listings(spare=100)
    listing = listings.open(5)
    listing.place([b"%03d" % number for number in range(150)], 0)
    assert listings.begin(5, listing).base == 150
