"""Places for targets that are made in great numbers."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def scratch() -> Iterator[Path]:
    """An empty directory in memory, if that can be had: there is nothing to wait for there.

    With extended attributes, which only newer kernels have in memory."""
    with contextlib.ExitStack() as stack:
        for place in ("/dev/shm", None):
            made = tempfile.TemporaryDirectory(prefix="warabi-", dir=place)
            with contextlib.suppress(OSError):
                path = stack.enter_context(made)
                os.setxattr(path, "user.warabi", b"")
                break
        yield Path(path)
