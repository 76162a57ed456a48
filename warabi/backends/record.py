"""What the rest of the library knows of a backend: one record, which its module defines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from warabi.backends.base import Storage
    from warabi.backends.settings import Model


class Plan(NamedTuple):
    """What the settings of a backend mean to the target, beside its storage."""

    create: bool = False
    """Whether a missing target is made."""
    creation: str = "create_if_missing"
    """The setting that asks for *create*, for messages."""
    override: bool = False
    """Whether an existing target is replaced."""
    pool: int | None = None
    """The quota in bytes that a new target has for ever; None: none."""
    capacity: int | None = None
    """The quota in bytes while it is open this time; None: *pool*."""
    packed: bool | None = None
    """Whether new small regions share files; None: the storage has no files that could be shared.
    Only for a :class:`~warabi.backends.file.FileStorage`."""
    checksums: bool | None = None
    """Whether blocks have checksums; None: as they have been so far."""
    threads: int | None = None
    """How many calls may wait for stable storage at once; None: as many as Trio allows."""


def usual_plan(settings: Any) -> Plan:
    """The plan of settings that are called ``create_if_missing``, ``override_if_exists``,
    ``capacity`` and ``checksums``, as far as a backend has them."""
    return Plan(
        create=getattr(settings, "create_if_missing", False),
        override=getattr(settings, "override_if_exists", False),
        capacity=getattr(settings, "capacity", None),
        checksums=getattr(settings, "checksums", None),
    )


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A type of target, as configurations name it.

    A backend either has *existing* or not.  With it, its targets outlive their process: the
    catalogue is the file ``path`` of its settings, which the library makes, locks and recovers
    after a crash, and the storage has the directory ``path + ".regions"``.  Without it, a target
    ends with its process and has no path.
    """

    name: str
    """What configurations and catalogues call it."""
    aliases: tuple[str, ...] = ()
    """Other names that configurations may use."""
    config: type[Model]
    """The model of its settings; a :class:`~warabi.backends.settings.PathModel` with *existing*."""
    storage: type[Storage]
    """The class of its storages, or what their classes derive from."""
    open: Callable[[Any, Path], Storage]
    """Opens a storage, from the settings and its directory, which exists and is locked; without
    *existing*, the directory is ``Path()`` and means nothing.  Raises what a storage may raise."""
    existing: Callable[[Path], Storage] | None = None
    """Opens what is stored in a directory, whatever the settings were, to be listed or destroyed;
    None where nothing outlives the process."""
    plan: Callable[[Any], Plan] = usual_plan
    """What the settings mean to the target."""
    in_memory: Callable[[int | None, Callable[[], int]], Storage] | None = None
    """Opens a storage whose regions are in this process's memory and share a limit with the
    catalogue.  Its arguments are the limit in bytes, None for what the machine can give, and a
    function that tells how many bytes the catalogue takes.  None for other backends, for which
    the mount option ``size`` is refused."""
    spelled: bool = True
    """Whether mounts and ``warabi serve --target`` take it as ``NAME:PATH``, or ``NAME:`` if it
    has no path.  With a path, its settings must have ``create_if_missing``."""
    fsck: bool = False
    """Whether ``warabi fsck`` can check it: it has the files of a
    :class:`~warabi.backends.file.FileStorage`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that a configuration may use."""
        return (self.name, *self.aliases)

    def spelled_settings(self, path: str, *, create: bool) -> dict[str, Any]:
        """The settings of ``NAME:PATH``; *create*: a target that is missing is made."""
        return {"path": path, "create_if_missing": create} if self.files else {}

    @property
    def files(self) -> bool:
        """Whether its targets have a path and outlive their process."""
        return self.existing is not None
