"""What a provider is about to do for a request: which bytes, of which region, of which target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from warabi import errors
from warabi._core import extents
from warabi._core.extents import Extent
from warabi.protocol.forms import shown
from warabi.protocol.operations import OPERATIONS, Payload, checked_arguments
from warabi.protocol.wire import Limits
from warabi.provider.core import ProviderCore
from warabi.region import RegionID
from warabi.target.target import Target

SMALL = 16 * 1024
"""Bytes of a read that is simply tried, into memory of its own."""


@dataclass(slots=True)
class TargetRequest:
    """A request with checked arguments, for a target that exists."""

    number: int
    name: str
    arguments: list[Any]
    core: ProviderCore
    target: Target
    eager: bytes | None
    payload: int  # bytes that follow
    entered: bool = False  # it is a change, and inside the provider's gate
    beside: bool = False  # it may wait for the medium, for others are answered meanwhile


@dataclass(slots=True)
class TransferPlan:
    """Which bytes of which region a transfer is about."""

    region: RegionID
    extents: list[Extent]
    persist: bool = False
    extend: bool = False
    short: bool = False
    created: bool = False


def checked_header(header: Any) -> list[Any]:
    """The five items of a request's header, of which only the arguments may be anything.

    Raises:
        ProtocolError: it is none.
    """
    if (
        not isinstance(header, list)
        or len(header) != 5
        or type(header[0]) is not int
        or type(header[1]) is not int
        or not isinstance(header[2], str)
        or not isinstance(header[4], bytes | None)
    ):
        raise errors.ProtocolError(f"not a request: {shown(header)}")
    return header


def check_data(name: str, eager: Any, payload: int) -> None:
    """Refuse data that an operation, which exists, does not take.

    Raises:
        ProtocolError: there are some.
    """
    if (payload or eager is not None) and OPERATIONS[name].payload is not Payload.UPLOAD:
        raise errors.ProtocolError(f"{name}: expected no payload")


def checked_request(
    number: int, core: ProviderCore, name: str, arguments: Any, eager: Any, payload: int
) -> TargetRequest:
    """A request for an operation on a target.

    Raises:
        ProtocolError: its arguments are not the operation's.
        TargetNotFound: the provider has none.
    """
    checked = checked_arguments(name, arguments)
    return TargetRequest(number, name, checked, core, core.target, eager, payload)


def memory(request: TargetRequest, limit: int) -> int:
    """How many bytes, *limit* at most, a request beside others keeps in memory until its reply is
    sent, which is for ever when the peer does not read."""
    size = request.payload or len(request.eager or b"")
    operation = OPERATIONS[request.name]
    if operation.payload is Payload.DOWNLOAD:
        at = operation.position.get("size")
        size = limit if at is None else request.arguments[at]
    return min(max(size, 0), limit)


def check_bounds(target: Target, plan: TransferPlan, what: str) -> None:
    """Refuse a transfer before memory for it is asked for."""
    have = target.size(plan.region)
    for offset, size in plan.extents:
        if not plan.extend and (offset < 0 or offset + size > have):
            raise errors.OutOfBounds(
                f"{what} {plan.region!r}: {size} bytes at offset {offset} end beyond its"
                f" {have} bytes"
            )


def plan_upload(request: TargetRequest) -> TransferPlan:
    """What to write where; what cannot be written is refused before its first chunk."""
    target, size = request.target, request.payload
    if request.name == "create_and_write":
        region = target.create(size)
        return TransferPlan(region, [(0, size)], persist=request.arguments[0], created=True)
    if request.name == "write":
        region, offset, persist, extend = request.arguments
        plan = TransferPlan(region, [(offset, size)], persist, extend)
    else:
        region, packed, persist = request.arguments
        plan = TransferPlan(region, extents.unpack(packed, request.name), persist)
        extents.check_total(plan.extents, size, request.name)
    check_bounds(target, plan, request.name)
    return plan


def plan_download(
    request: TargetRequest, own: Limits, peer: Limits
) -> tuple[TransferPlan, int, bool]:
    """What to read from where, how many bytes, and whether these go into the reply's header.

    Args:
        request: whose reply it is.
        own: limits of this side, which allocates what is read.
        peer: those of the other one, which may be anything.
    """
    eager = False
    short = False
    if request.name == "read":
        region, offset, size, eager, short = request.arguments
        if short and size > 0:
            size = min(size, max(0, request.target.size(region) - offset))
        plan = TransferPlan(region, [(offset, size)], short=short)
    else:
        region, packed = request.arguments
        plan = TransferPlan(region, extents.unpack(packed, request.name))
        size = extents.total(plan.extents)
    limit = min(peer.payload, own.payload)
    if not 0 <= size <= limit or (eager and size > peer.header // 2):
        raise errors.ProtocolError(
            f"{request.name}: {size} bytes in one reply, the limit is {limit}"
        )
    if not short and (size > SMALL or request.name != "read"):
        check_bounds(request.target, plan, request.name)
    return plan, size, eager
