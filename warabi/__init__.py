"""Warabi in Python: a blob store for HPC.

Start at :mod:`warabi.client`, :mod:`warabi.server`, or :mod:`warabi.aio` for Trio programs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from warabi.mounted import locate as locate

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what few programs need when it is first used."""
    if name == "locate":
        return importlib.import_module("warabi.mounted").locate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
