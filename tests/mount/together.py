"""One provider, two mounts of it, and a client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.mount.support import MIB, PROVIDER_ID, Mount, Provider, mounting, run, serving, watchdog
from warabi import engine as warabi_engine
from warabi.client import Client, TargetHandle
from warabi.errors import InvalidRegion
from warabi.region import RegionID

OPTIONS = (f"provider_id={PROVIDER_ID}",)
BELIEVING = (*OPTIONS, "attr_timeout=86400", "entry_timeout=86400")
"""What the kernel knows stays true in its eyes, unless it is told otherwise."""


class Together(NamedTuple):
    """Two mounts and a client of one provider, each a process of its own but for the client."""

    provider: Provider
    first: Mount
    second: Mount
    target: TargetHandle


@contextlib.contextmanager
def together(transport: str, place: Path, *options: str) -> Iterator[Together]:
    """The four, while the block runs; both mounts have *options*."""
    for name in ("first", "second"):
        (place / name).mkdir()
    with (
        serving(transport) as provider,
        mounting(provider.address, place / "first", *options) as first,
        mounting(provider.address, place / "second", *options) as second,
        warabi_engine.Engine(transport, warabi_engine.client) as engine,
    ):
        yield Together(provider, first, second, client_of(provider, engine))


def client_of(provider: Provider, engine: warabi_engine.Engine) -> TargetHandle:
    """A handle to the provider's target, which reaches regions directly where that can be."""
    target = Client(engine).make_target_handle(provider.address, PROVIDER_ID)
    # Large enough for that: its connection is there before a test is.
    region = target.create_and_write(bytes(MIB))
    target.read(region, 0, MIB)
    target.erase(region)
    return target


@contextlib.contextmanager
def emptied(four: Together, seconds: float) -> Iterator[Together]:
    """The four with an empty target, and limits in time for the block."""
    with watchdog(four.first, seconds), watchdog(four.second, seconds):
        yield four
        for mount in (four.first, four.second):
            run("find", mount.path, "-mindepth", "1", "-delete", check=False)
            assert mount.alive
    for mount in (four.first, four.second):
        mount.check_log()


def region_of(path: Path) -> RegionID:
    """The region of a file, as a shell script gets it."""
    text = run("getfattr", "-n", "user.warabi.region", "--only-values", path).stdout
    return RegionID(bytes.fromhex(text))


def erased(target: TargetHandle, region: RegionID) -> bool:
    """Whether *region* is gone, which it is as soon as the kernel has let go of its inode."""
    try:
        target.size(region)
    except InvalidRegion:
        return True
    return False
