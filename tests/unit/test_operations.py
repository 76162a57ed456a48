"""The table of operations is complete, and matches the methods that execute them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import trio

from warabi import aio, errors
from warabi.metadata.namespace import Namespace
from warabi.protocol.auth import RequiredAccess
from warabi.protocol.forms import FLAG, INTEGER, NOTHING, Form
from warabi.protocol.operations import (
    OPERATIONS,
    READING,
    ChangeScope,
    Operation,
    Payload,
    Served,
    Syncs,
    access,
    checked_arguments,
)
from warabi.provider.migration.exchange import Exchange
from warabi.reconnect import ReconnectingLink
from warabi.target.handlers import CALLS
from warabi.target.target import Target

_ON_TARGETS = {name: one for name, one in OPERATIONS.items() if one.served is Served.TARGET}

# By name: an operation that is new changes something, is not repeatable, and does not run in a
# worker thread for targets that never wait, or these lists say that it was thought about.
CHANGES_NOTHING = """
    cancel_lock commit epoch fsync getattr getxattr grant holds_lock join leave list list_stats
    listxattr lock lock_session lookup migration_progress open open_name persist persist_vector pin
    ping read read_vector readdir readlink resolve room seek size stat stats summed sync test_lock
    unpin used uuid verify watch fetch
""".split()
REPEATABLE_CHANGES = """
    allocate copy_range punch_hole receive_outcome resize set_flags setattr setxattr survey write
    write_vector zero_range
""".split()
NOT_REPEATED_READS = "grant join leave".split()
WAITING = """
    adopt allocate clone commit copy copy_range fsync graft migrate persist persist_vector
    punch_hole read_vector receive_commit receive_finish receive_outcome resize seek set_flags
    survey sync update verify write_vector zero_range
""".split()
LONG = "clone copy copy_range graft survey".split()


@pytest.mark.parametrize("name", OPERATIONS)
def test_everything_is_said(name: str) -> None:
    operation = OPERATIONS[name]
    assert isinstance(operation.access, RequiredAccess)
    assert isinstance(operation.changes, ChangeScope)
    assert isinstance(operation.payload, Payload)
    assert isinstance(operation.syncs, Syncs)
    assert isinstance(operation.served, Served)
    assert isinstance(operation.result, Form)
    assert all(
        isinstance(form, Form) and argument for argument, form in operation.arguments.items()
    )
    assert access(name) is operation.access


def test_what_is_unknown_is_refused() -> None:
    with pytest.raises(errors.ProtocolError, match="unknown operation 'nothing'"):
        access("nothing")


def test_which_operations_change_nothing() -> None:
    reading = {name for name, one in OPERATIONS.items() if one.access is RequiredAccess.READ}
    assert reading == set(CHANGES_NOTHING)
    unchanging = {name for name, one in OPERATIONS.items() if one.changes is ChangeScope.NOTHING}
    assert unchanging == reading | {"receive_outcome"}  # which only a source may ask
    assert reading >= READING


def test_which_operations_are_repeatable() -> None:
    repeatable = {name for name, one in OPERATIONS.items() if one.repeatable}
    assert repeatable == set(CHANGES_NOTHING) - set(NOT_REPEATED_READS) | set(REPEATABLE_CHANGES)
    for name in repeatable:  # a second time would find what the first one did
        assert OPERATIONS[name].changes not in (ChangeScope.NAMES, ChangeScope.TARGET), name


def test_which_operations_may_run_in_a_loop() -> None:
    """Those that wait for a medium, or take long without, are not forgotten."""
    assert {name for name, one in OPERATIONS.items() if one.waits} == set(WAITING)
    assert {name for name, one in OPERATIONS.items() if one.long} == set(LONG)


def test_a_new_operation_is_not_repeated() -> None:
    assert not Operation({}, NOTHING, RequiredAccess.CHANGE, ChangeScope.NAMES).repeatable


@pytest.mark.parametrize("name", _ON_TARGETS)
def test_a_target_has_what_takes_the_arguments(name: str) -> None:
    operation = OPERATIONS[name]
    call = getattr(Namespace, name, None) or getattr(Target, name, None) or CALLS[name]
    if isinstance(call, property):
        assert not operation.arguments
        return
    parameters = list(inspect.signature(call).parameters.values())[1:]
    count = len(operation.arguments) + (operation.payload is not Payload.NONE)
    required = [
        one for one in parameters if one.default is one.empty and one.kind is not one.KEYWORD_ONLY
    ]
    assert len(required) <= count <= len(parameters)
    assert name in CALLS


def test_no_call_is_without_an_operation() -> None:
    assert CALLS.keys() == _ON_TARGETS.keys()


def test_migrations_have_methods_that_take_the_arguments() -> None:
    for name, operation in OPERATIONS.items():
        if operation.served is Served.MIGRATION:
            parameters = inspect.signature(getattr(Exchange, f"_{name}")).parameters
            count = len(operation.arguments) + (operation.payload is Payload.UPLOAD)
            assert len(parameters) == 2 + count, name


def test_arguments_that_code_looks_up_by_name() -> None:
    for name, operation in OPERATIONS.items():
        arguments = operation.arguments
        if operation.changes is ChangeScope.REGION or operation.syncs is Syncs.REGION:
            assert next(iter(arguments)) == "region", name
        if operation.payload is Payload.UPLOAD and operation.served is Served.TRANSFER:
            assert arguments["persist"] is FLAG, name
    assert OPERATIONS["read"].arguments["size"] is INTEGER
    owners = {name: one.owner for name, one in OPERATIONS.items() if one.owner is not None}
    assert owners == {"mknod": 3, "mkdir": 3, "symlink": 3, "tmpfile": 3, "store": 2, "publish": 4}


def test_what_syncs_changes_nothing() -> None:
    for name, operation in OPERATIONS.items():
        if operation.syncs is not Syncs.NOTHING:
            assert (operation.changes, operation.repeatable) == (ChangeScope.NOTHING, True), name


@pytest.mark.parametrize("arguments", [None, 5, b"", {}, [], [1], [1, 2, 3]])
def test_numbers_of_arguments(arguments: Any) -> None:
    with pytest.raises(errors.ProtocolError, match="resize: expected 2 arguments"):
        checked_arguments("resize", arguments)


class _Losing:
    """A link that loses every first reply."""

    def __init__(self) -> None:
        self.calls = 0

    async def call(self, name: str, arguments: Sequence[Any]) -> Any:
        await trio.lowlevel.checkpoint()
        self.calls += 1
        if self.calls == 1:
            raise errors.ConnectionLost("the reply was lost")
        return None


@pytest.mark.parametrize("name", OPERATIONS)
def test_only_what_is_repeatable_is_sent_again(name: str) -> None:
    async def main() -> int:
        losing = _Losing()
        link = ReconnectingLink(lambda ended: aio.connect("na+sm", 1), "a provider", 5)
        link._link = losing  # type: ignore[assignment]

        async def connect_again() -> None:
            while link._link is not None:
                await trio.lowlevel.checkpoint()
            link._link = losing  # type: ignore[assignment]
            link._back.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect_again)
            try:
                await link._do(name, lambda one: one.call(name, ()))
            except errors.ConnectionLost:
                assert not OPERATIONS[name].repeatable
            nursery.cancel_scope.cancel()
        return losing.calls

    assert trio.run(main) == (2 if OPERATIONS[name].repeatable else 1)
