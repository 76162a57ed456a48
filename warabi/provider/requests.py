"""Validation of requests, and planning of transfers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from warabi import errors
from warabi._core import extents
from warabi._core.extents import Extent, beyond_end
from warabi.protocol.forms import shown
from warabi.protocol.operations import OPERATIONS, Payload, checked_arguments
from warabi.protocol.wire import Limits
from warabi.provider.core import ProviderCore
from warabi.region import RegionID
from warabi.target.target import Target

SMALL = 16 * 1024
"""Most bytes of a read that is tried without planning, into a separate buffer."""


@dataclass(slots=True)
class TargetRequest:
    """A validated request for an existing target."""

    number: int
    name: str
    arguments: list[Any]
    core: ProviderCore
    target: Target
    eager: bytes | None
    payload: int  # bytes of the payload that follows
    began: int  # when its header was received, by perf_counter_ns
    entered: bool = False  # it is a change, and has entered the provider's gate
    concurrent: bool = False  # it may wait for stable storage, since it runs concurrently


@dataclass(slots=True)
class TransferPlan:
    """Region and extents of a transfer."""

    region: RegionID
    extents: list[Extent]
    persist: bool = False
    extend: bool = False
    short: bool = False
    created: bool = False


def checked_header(header: Any) -> list[Any]:
    """Return the five items of a request's header; the arguments are not validated.

    Raises:
        ProtocolError: it is not a request.
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
    """Check that an existing operation accepts a payload, if there is one.

    Raises:
        ProtocolError: it does not.
    """
    if (payload or eager is not None) and OPERATIONS[name].payload is not Payload.UPLOAD:
        raise errors.ProtocolError(f"{name}: expected no payload")


def checked_request(
    number: int,
    core: ProviderCore,
    name: str,
    arguments: Any,
    eager: Any,
    payload: int,
    began: int,
) -> TargetRequest:
    """Validate a request for an operation on a target.

    Raises:
        ProtocolError: invalid arguments.
        TargetNotFound: the provider has no target.
    """
    checked = checked_arguments(name, arguments)
    return TargetRequest(number, name, checked, core, core.target, eager, payload, began)


def memory(request: TargetRequest, limit: int) -> int:
    """Return the bytes, at most *limit*, that a concurrent request keeps in memory until its reply
    is sent, which may never happen if the peer does not read."""
    size = request.payload or len(request.eager or b"")
    operation = OPERATIONS[request.name]
    if operation.payload is Payload.DOWNLOAD:
        at = operation.position.get("size")
        size = limit if at is None else request.arguments[at]
    return min(max(size, 0), limit)


def check_bounds(target: Target, plan: TransferPlan, what: str) -> None:
    """Check the bounds of a transfer before allocating memory."""
    have = target.size(plan.region)
    for offset, size in plan.extents:
        if not plan.extend and (offset < 0 or offset + size > have):
            raise beyond_end(what, plan.region, offset, size, have)


def plan_upload(request: TargetRequest) -> TransferPlan:
    """Plan a write; invalid ones are rejected before the first chunk."""
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
    """Plan a read; returns also its size, and whether the data are sent inside the reply's header.

    Args:
        request: the request.
        own: limits of this side, which allocates the data.
        peer: limits of the other side, which may be any numbers.
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
