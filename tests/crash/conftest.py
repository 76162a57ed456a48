"""Places for targets that are made in great numbers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def scratch() -> Iterator[Path]:
    """An empty directory in memory, if that can be had: there is nothing to wait for there."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="warabi-", dir=memory) as path:
        yield Path(path)
