"""The description of a backend for the rest of the library: one record, defined by its module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from warabi.backends.base import Storage
    from warabi.backends.remote import RemoteTarget
    from warabi.backends.settings import Model


class Plan(NamedTuple):
    """What the settings of a backend mean for the target, in addition to its storage."""

    create: bool = False
    """Whether to create a missing target."""
    creation: str = "create_if_missing"
    """The setting that enables *create*, for messages."""
    override: bool = False
    """Whether to replace an existing target."""
    pool: int | None = None
    """The permanent quota of a new target in bytes; None: none."""
    capacity: int | None = None
    """The quota in bytes while it is open this time; None: *pool*."""
    packed: bool | None = None
    """Whether new small regions share files; None: the storage has no files that could be shared.
    Only for a :class:`~warabi.backends.file.FileStorage`."""
    checksums: bool | None = None
    """Whether blocks have checksums; None: keep the target's setting."""
    threads: int | None = None
    """Most calls that wait for stable storage concurrently; None: Trio's default."""


def usual_plan(settings: Any) -> Plan:
    """Return the plan for the settings ``create_if_missing``, ``override_if_exists``, ``capacity``
    and ``checksums``, if the backend has them."""
    return Plan(
        create=getattr(settings, "create_if_missing", False),
        override=getattr(settings, "override_if_exists", False),
        capacity=getattr(settings, "capacity", None),
        checksums=getattr(settings, "checksums", None),
    )


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A type of target in configurations.

    Backends with *existing* are persistent: the catalogue is the file ``path`` of its settings,
    which the library creates, locks and recovers after a crash, and the storage has the directory
    ``path + ".regions"``.  Those with *remote* are persistent, too, with catalogue and regions on
    another system.  Otherwise a target ends with its process and has no path.
    """

    name: str
    """The name in configurations and catalogues."""
    aliases: tuple[str, ...] = ()
    """Other names in configurations."""
    config: type[Model]
    """The model of its settings; a :class:`~warabi.backends.settings.PathModel` with *existing*."""
    storage: type[Storage]
    """The class, or a base class, of its storages."""
    open: Callable[[Any, Path], Storage]
    """Opens a storage, from the settings and its directory, which exists and is locked; without
    *existing*, the directory is ``Path()`` and has no meaning.  Raises what a storage may raise."""
    existing: Callable[[Path], Storage] | None = None
    """Opens the contents of a directory, whatever the settings were, to be listed or destroyed;
    None if the backend is not persistent."""
    remote: Callable[[Any, float], RemoteTarget] | None = None
    """Takes the ownership of a target on another system, from the settings and the seconds to wait
    for another owner; the target may be missing if ``create_if_missing`` is set.  None for others,
    which have *open*."""
    spelling: Callable[[str], dict[str, Any]] | None = None
    """With *remote*: converts ``PLACE`` of the spelling ``NAME:PLACE`` to settings; raises
    ``ConfigError``."""
    plan: Callable[[Any], Plan] = usual_plan
    """Converts the settings to a plan."""
    in_memory: Callable[[int | None, Callable[[], int]], Storage] | None = None
    """Opens a storage whose regions are in this process's memory and share a limit with the
    catalogue.  Its arguments are the limit in bytes, None for what the machine can provide, and a
    function that returns the bytes that the catalogue uses.  None for other backends, which do not
    support the mount option ``size``."""
    spelled: bool = True
    """Whether mounts and ``warabi serve --target`` accept it as ``NAME:PATH``, or ``NAME:`` if it
    has no path.  With a path, its settings must have ``create_if_missing``."""
    fsck: bool = False
    """Whether ``warabi fsck`` can check it: it has the files of a
    :class:`~warabi.backends.file.FileStorage`."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names that a configuration may use."""
        return (self.name, *self.aliases)

    def spelled_settings(self, path: str, *, create: bool) -> dict[str, Any]:
        """Return the settings of ``NAME:PATH``; *create*: whether to create a missing target."""
        if self.spelling is not None:
            return {**self.spelling(path), "create_if_missing": create}
        return {"path": path, "create_if_missing": create} if self.files else {}

    @property
    def placed(self) -> bool:
        """Whether a spelling says more than its name."""
        return self.files or self.spelling is not None

    @property
    def files(self) -> bool:
        """Whether its targets have a path on this system, and outlive their process."""
        return self.existing is not None
