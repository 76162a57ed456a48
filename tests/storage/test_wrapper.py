"""``WrapperStorage`` forwards every call of the interface, or leaves it abstract."""

from __future__ import annotations

import inspect
from unittest import mock

import pytest

from warabi.backends.base import Storage
from warabi.backends.checksummed import SummedStorage
from warabi.backends.packed import PackedStorage
from warabi.backends.wrapper import WrapperStorage

METHODS = sorted(n for n, each in vars(Storage).items() if inspect.isfunction(each))
ABSTRACT = WrapperStorage.__abstractmethods__
FORWARDED = sorted(set(METHODS) - ABSTRACT)


def wrapper(inner: Storage) -> WrapperStorage:
    """A wrapper that changes nothing, and cannot do what is abstract."""
    rest = dict.fromkeys(ABSTRACT)
    made: WrapperStorage = type("Plain", (WrapperStorage,), rest)(inner)
    return made


@pytest.mark.parametrize("name", METHODS)
def test_every_call_is_forwarded_or_abstract(name: str) -> None:
    assert name in vars(WrapperStorage)
    assert inspect.signature(vars(WrapperStorage)[name]) == inspect.signature(vars(Storage)[name])


@pytest.mark.parametrize("name", FORWARDED)
def test_what_is_forwarded_has_its_arguments_and_gives_the_result(name: str) -> None:
    inner = mock.create_autospec(Storage, instance=True)
    parameters = list(inspect.signature(vars(Storage)[name]).parameters.values())[1:]
    words = {p.name: object() for p in parameters if p.kind is p.KEYWORD_ONLY}
    values = [object() for p in parameters if p.name not in words]
    result = getattr(wrapper(inner), name)(*values, **words)
    call = getattr(inner, name)
    call.assert_called_once_with(*values, **words)
    if inspect.signature(vars(Storage)[name]).return_annotation != "None":
        assert result is call.return_value


def test_what_reads_or_changes_bytes_is_abstract() -> None:
    assert {"read_into", "view", "write", "resize", "share", "persist", "clone"} <= ABSTRACT
    for made in (SummedStorage, PackedStorage):
        assert issubclass(made, WrapperStorage)
        assert not inspect.isabstract(made)
