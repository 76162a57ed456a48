"""Access control lists: their form, and what a target makes of them without a mount."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.helpers import open_memory
from warabi._core.attributes import ROOT
from warabi.errors import PathError
from warabi.metadata import acl
from warabi.metadata.acl import AclEntry
from warabi.metadata.namespace import Namespace
from warabi.target.config import MemoryConfig

bits = st.integers(0, 7)
named = st.lists(st.tuples(bits, st.integers(0, 2**32 - 2)), max_size=3)


@st.composite
def lists(draw: st.DrawFn) -> list[AclEntry]:
    """A valid list."""
    users = [AclEntry(2, *pair) for pair in draw(named)]
    groups = [AclEntry(8, *pair) for pair in draw(named)]
    masked = bool(users or groups or draw(bits) % 2)
    mask = [AclEntry(16, draw(bits), 0)] if masked else []
    return [
        AclEntry(1, draw(bits), 0), *users, AclEntry(4, draw(bits), 0), *groups, *mask,
        AclEntry(32, draw(bits), 0),
    ]  # fmt: skip


@given(lists())
def test_a_list_survives_its_form(entries: list[AclEntry]) -> None:
    assert acl.unpack(acl.pack(entries)) == entries
    assert acl.extended(entries) == (len(entries) > 3)


@given(lists(), st.integers(0, 0o777))
def test_a_list_shows_the_mode_that_was_set_and_names_keep_their_bits(
    entries: list[AclEntry], mode: int
) -> None:
    changed = acl.with_mode(entries, mode)
    assert acl.mode_of(changed) == mode
    assert acl.with_mode(entries, acl.mode_of(entries)) == entries
    kept = (2, 8, 4) if acl.extended(entries) else (2, 8)
    for before, after in zip(entries, changed, strict=True):
        assert (before.tag, before.id) == (after.tag, after.id)
        assert before == after or before.tag not in kept


@given(st.binary(max_size=60))
def test_any_bytes_are_a_list_or_refused(value: bytes) -> None:
    try:
        entries = acl.unpack(struct.pack("<I", 2) + value)
    except PathError as error:
        assert error.errno == errno.EINVAL  # noqa: PT017
    else:
        assert acl.unpack(acl.pack(entries)) == entries


@pytest.fixture
def names() -> Iterator[Namespace]:
    with open_memory(MemoryConfig()) as target:
        yield target.namespace


LIST = acl.pack(
    [
        AclEntry(1, 7, 0),
        AclEntry(2, 6, 1000),
        AclEntry(4, 5, 0),
        AclEntry(16, 7, 0),
        AclEntry(32, 0, 0),
    ]
)


def test_a_list_and_a_mode_are_kept_true_to_each_other(names: Namespace) -> None:
    made = names.mknod(ROOT, b"file", 0o644, 1, 2)
    names.setxattr(made.ino, acl.ACCESS, LIST)
    assert names.getattr(made.ino).mode & 0o7777 == 0o770
    names.setattr(made.ino, mode=0o4640)
    assert names.getattr(made.ino).mode & 0o7777 == 0o4640
    assert AclEntry(16, 4, 0) in acl.unpack(names.getxattr(made.ino, acl.ACCESS))
    assert AclEntry(2, 6, 1000) in acl.unpack(names.getxattr(made.ino, acl.ACCESS))
    names.setattr(made.ino, uid=5)
    assert names.getattr(made.ino).mode & 0o7777 == 0o4640
    names.setxattr(
        made.ino, acl.ACCESS, acl.pack([AclEntry(1, 6, 0), AclEntry(4, 4, 0), AclEntry(32, 0, 0)])
    )
    assert names.listxattr(made.ino) == []
    assert names.getattr(made.ino).mode & 0o7777 == 0o4640


def test_a_default_list_comes_before_the_umask(names: Namespace) -> None:
    parent = names.mkdir(ROOT, b"d", 0o755, 0, 0).ino
    assert names.mknod(parent, b"before", 0o666, 0, 0, umask=0o077).mode & 0o777 == 0o600
    names.setxattr(parent, acl.DEFAULT, LIST)
    assert names.getattr(parent).mode & 0o777 == 0o755
    file = names.mknod(parent, b"file", 0o666, 0, 0, umask=0o077)
    assert file.mode & 0o777 == 0o660
    assert names.listxattr(file.ino) == [acl.ACCESS]
    below = names.mkdir(parent, b"below", 0o700, 0, 0, umask=0o077)
    assert below.mode & 0o777 == 0o700
    assert names.listxattr(below.ino) == [acl.ACCESS, acl.DEFAULT]
    assert names.getxattr(below.ino, acl.DEFAULT) == LIST
    assert names.listxattr(names.symlink(parent, b"link", b"x", 0, 0).ino) == []
    names.removexattr(parent, acl.DEFAULT)
    names.removexattr(parent, acl.DEFAULT)
    assert names.mkdir(parent, b"after", 0o777, 0, 0, umask=0o022).mode & 0o777 == 0o755


def test_a_dot_and_two_are_names_that_can_be_looked_up(names: Namespace) -> None:
    one = names.mkdir(ROOT, b"one", 0o755, 0, 0)
    two = names.mkdir(one.ino, b"two", 0o755, 0, 0)
    assert names.lookup(two.ino, b".").ino == two.ino
    assert names.lookup(two.ino, b"..").ino == one.ino
    assert names.lookup(one.ino, b"..").ino == names.lookup(ROOT, b"..").ino == ROOT
    names.rename(one.ino, b"two", ROOT, b"moved")
    assert names.lookup(two.ino, b"..").ino == ROOT
    file = names.mknod(two.ino, b"file", 0o644, 0, 0).ino  # as file handles are resolved
    assert (names.lookup(file, b".").ino, names.lookup(file, b"..").ino) == (file, two.ino)
