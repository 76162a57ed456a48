"""Targets of each kind that lasts, opened as a program opens them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from warabi.backends.pack_format import PACK, SLOT, is_pack, pack_of, slots_of
from warabi.metadata.inode import OWN, PACKED
from warabi.region import RegionID
from warabi.target import opening
from warabi.target.config import FileConfig, PmemConfig
from warabi.target.target import Target

BACKENDS = ("file", "loose", "pmem", "sync", "direct", "trio")
"""What is tried: the two storages, files without packs, the settings that change what a write waits
for, and ``file`` for a Trio program."""
POOL = 64 << 20


def opened(
    backend: str, path: str | Path, *, create: bool = True, override: bool = False
) -> Target:
    """The target at *path*, made when it is missing and *create* says so."""
    if backend == "pmem":
        size = POOL if create else 0
        return opening.open_pmem(
            PmemConfig(
                path=str(path), create_if_missing_with_size=size, override_if_exists=override
            )
        )
    return opening.open_file(
        FileConfig(
            path=str(path), create_if_missing=create, override_if_exists=override,
            sync=backend == "sync", directio=backend == "direct",
            checksums=True if backend == "summed" else None, packed=backend != "loose",
        )
    )  # fmt: skip


def accounted(path: str | Path, target: Target, regions: Mapping[Any, bytes]) -> None:
    """*regions*, with their bytes, have all that is stored at *path*, and nothing of it is odd."""
    found = list(Path(f"{path}.regions").glob("[0-9a-f][0-9a-f]/" + "[0-9a-f]" * 32))
    files: dict[RegionID, Path] = {}
    packs: dict[RegionID, Path] = {}
    for file in found:
        rid = RegionID(bytes.fromhex(file.name))
        (packs if is_pack(rid) else files)[rid] = file
    rows = {rid: target._catalogue.region(rid) for rid in regions}
    where = {rid: row.packed for rid, row in rows.items() if row is not None}
    sizes = {rid: file.stat().st_size for rid, file in files.items()}
    expected = {rid: len(data) for rid, data in regions.items() if where[rid] != PACKED}
    assert sizes == expected, f"files {sizes.keys() ^ expected.keys()} are odd"
    slots = {RegionID(rid).slot for rid in regions if where[rid] != OWN}
    packed = {pack_of(RegionID(rid).slot) for rid in regions if where[rid] == PACKED}
    assert packed <= packs.keys()
    for pack, file in packs.items():
        bytes_ = file.read_bytes()
        assert len(bytes_) == PACK
        for number, slot in enumerate(slots_of(pack)):
            odd = slot not in slots and any(bytes_[number * SLOT : (number + 1) * SLOT])
            assert not odd, f"slot {slot} has bytes that are no region's"
