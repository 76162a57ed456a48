"""Targets of each kind that lasts, opened as a program opens them."""

from __future__ import annotations

from pathlib import Path

from warabi import layout
from warabi.config import FileConfig, PmemConfig
from warabi.target import Target

BACKENDS = ("file", "pmem", "sync", "direct", "trio")
"""What is tried: the two storages, the settings that change what a write waits for, and ``file``
for a Trio program."""
POOL = 64 << 20


def opened(
    backend: str, path: str | Path, *, create: bool = True, override: bool = False
) -> Target:
    """The target at *path*, made when it is missing and *create* says so."""
    if backend == "pmem":
        size = POOL if create else 0
        return layout.open_pmem(
            PmemConfig(
                path=str(path), create_if_missing_with_size=size, override_if_exists=override
            )
        )
    return layout.open_file(
        FileConfig(
            path=str(path), create_if_missing=create, override_if_exists=override,
            sync=backend == "sync", directio=backend == "direct",
            checksums=True if backend == "summed" else None,
        )
    )  # fmt: skip


def files_of(path: str | Path) -> dict[bytes, int]:
    """ID and size of every region file."""
    found = Path(f"{path}.regions").glob("[0-9a-f][0-9a-f]/" + "[0-9a-f]" * 32)
    return {bytes.fromhex(file.name): file.stat().st_size for file in found}
