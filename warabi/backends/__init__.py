"""Where the bytes of regions live: each backend is a module with one record.

:mod:`warabi.backends.registry` has the table.  It is not imported here: whoever opens no target
needs neither storages nor the checks of their settings.
"""

from __future__ import annotations

from warabi.backends.base import Storage
from warabi.backends.record import Backend, Plan

__all__ = ["Backend", "Plan", "Storage", "register"]


def register(backend: Backend) -> None:
    """Make a backend known to this process: its name is then a ``type`` of targets.

    A package that is installed announces its backend instead, by an entry point of the group
    ``warabi.backends``; then mounts and the ``warabi`` command know it, too.

    Raises:
        ConfigError: one of its names is taken or is no name, or the record contradicts itself.
    """
    from warabi.backends import registry

    registry.register(backend)
