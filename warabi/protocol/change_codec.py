"""Encoding of ``Changes`` in messages."""

from __future__ import annotations

from typing import Any

from warabi._core.changes import Changes
from warabi.protocol.forms import Form


def to_wire(changes: Changes) -> list[object]:
    """Return *changes* as a value for a message."""
    names = [[parent, name, ino] for (parent, name), ino in changes.names.items()]
    return [changes.number, changes.everything, [*map(list, changes.inodes.items())], names]


def _from_wire(value: list[Any]) -> Changes:
    number, everything, inodes, names = value
    meanings = {(parent, name): ino for parent, name, ino in names}
    changed = dict(inodes)
    numbers = [number, *changed, *changed.values(), *meanings.values()]
    if type(everything) is not bool or not {*map(type, numbers)} <= {int}:
        raise TypeError
    if not {(type(parent), type(name)) for parent, name in meanings} <= {(int, bytes)}:
        raise TypeError
    return Changes(number, everything, changed, meanings)


CHANGES = Form("changes of a target", (list,), _from_wire)
"""The form of the result of :func:`to_wire`."""
