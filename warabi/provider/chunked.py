"""Transfers larger than a buffer, in chunks: one chunk on the socket, while others are being stored
or loaded."""

from __future__ import annotations

import trio

from warabi import errors
from warabi._core import extents
from warabi.in_process import async_ops
from warabi.protocol import wire
from warabi.protocol.pending import chunks
from warabi.provider.buffer_pool import load, part, store
from warabi.provider.channel import Channel
from warabi.provider.requests import TargetRequest, TransferPlan, plan_upload
from warabi.region import RegionID


async def upload(channel: Channel, request: TargetRequest) -> RegionID | None:
    """Receive a chunk while previous ones are being stored; returns the result of the operation."""
    transfers = request.core.transfers
    failures: list[Exception] = []
    plan: TransferPlan | None = None
    try:
        plan = plan_upload(request)
    except errors.Exception as error:
        failures.append(error)
    if plan is None:
        await channel.drop_payload()
        raise failures[0]
    broken: Exception | None = None
    async with trio.open_nursery() as stores:
        try:
            for start, end in chunks(request.payload, transfers.chunk):
                view = await transfers.acquire(end - start)
                try:
                    await channel.fill(view, transfers.patience)
                except BaseException:
                    transfers.release(view)
                    raise
                stores.start_soon(_store_chunk, request, plan, start, end, view, failures)
        except Exception as error:  # a nursery would wrap it in a group
            broken = error
    if plan.created and (broken or failures):
        request.target.erase(plan.region)
    if broken or failures:
        raise broken or failures[0]
    if plan.persist:
        packed = extents.pack(plan.extents)
        await async_ops.execute(request.target, "persist_vector", [plan.region, packed])
    return plan.region if plan.created else None


async def _store_chunk(
    request: TargetRequest, plan: TransferPlan, start: int, end: int, view: memoryview,
    failures: list[Exception],
) -> None:  # fmt: skip
    try:
        pieces = part(plan.extents, start, end)
        await store(request.target, plan.region, pieces, view, plan.extend)
    except Exception as error:
        failures.append(error)
    finally:
        request.core.transfers.release(view)


async def download(channel: Channel, request: TargetRequest, plan: TransferPlan, size: int) -> None:
    """Load a chunk while the previous one is being sent.

    The first chunk is loaded before anything is sent, so that early errors are reported in a reply;
    later ones can only close the connection.
    """
    transfers = request.core.transfers
    pieces = list(chunks(size, transfers.chunk))
    view = await transfers.acquire(transfers.chunk)
    try:
        await _load_chunk(request, plan, pieces[0], view)
        async with channel.stream(transfers.patience) as send:
            await send(wire.frame([request.number, None], size))
            for index, (start, end) in enumerate(pieces):
                following = pieces[index + 1] if index + 1 < len(pieces) else None
                # Never wait for a second buffer while holding one, which could deadlock.
                ahead = transfers.acquire_nowait(transfers.chunk) if following else None
                failures: list[Exception] = []
                async with trio.open_nursery() as nursery:
                    if following and ahead is not None:
                        nursery.start_soon(_load_ahead, request, plan, following, ahead, failures)
                    try:
                        await send(view[: end - start])
                    except Exception as error:
                        failures.append(error)
                if ahead is not None:
                    transfers.release(view)
                    view = ahead
                if failures:
                    raise failures[0]
                if following and ahead is None:
                    await _load_chunk(request, plan, following, view)
    finally:
        transfers.release(view)


async def _load_chunk(
    request: TargetRequest, plan: TransferPlan, piece: tuple[int, int], view: memoryview
) -> None:
    """Load the range *piece* of the bytes of *plan*."""
    start, end = piece
    pieces = part(plan.extents, start, end)
    await load(request.target, plan.region, pieces, view[: end - start], plan.short)


async def _load_ahead(
    request: TargetRequest, plan: TransferPlan, piece: tuple[int, int], view: memoryview,
    failures: list[Exception],
) -> None:  # fmt: skip
    """The same as :func:`_load_chunk`, concurrently; errors are added to *failures*."""
    try:
        await _load_chunk(request, plan, piece, view)
    except Exception as error:
        failures.append(error)
