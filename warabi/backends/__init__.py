"""Storage backends, which store the data of regions: each is a module with one record.

:mod:`warabi.backends.registry` has the table.  It is not imported here, since a process that opens
no target needs neither storages nor the validation of their settings.
"""

from __future__ import annotations

from warabi.backends.base import Storage
from warabi.backends.record import Backend, Plan

__all__ = ["Backend", "Plan", "Storage", "register"]


def register(backend: Backend) -> None:
    """Register a backend in this process: its name is then a ``type`` of targets.

    An installed package declares its backend by an entry point of the group ``warabi.backends``
    instead; then mounts and the ``warabi`` command know it, too.

    Raises:
        ConfigError: a name is in use or not valid, or the record is inconsistent.
    """
    from warabi.backends import registry

    registry.register(backend)
