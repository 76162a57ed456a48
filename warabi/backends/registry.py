"""Which backends there are: the library's own, those that a program registered, and those of
installed packages.

A package announces a backend by an entry point of the group ``warabi.backends``, whose name is the
backend's and whose object is its :class:`~warabi.backends.record.Backend`.  Entry points are looked
at when a name is used that is not known otherwise, so they cost nothing before.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib import metadata

from warabi.backends import file, memory, pmem
from warabi.backends.record import Backend
from warabi.backends.settings import PathModel
from warabi.errors import ConfigError

GROUP = "warabi.backends"
"""The entry points' group."""

_BUILT_IN: tuple[Backend, ...] = (
    memory.BACKEND,
    file.BACKEND,
    pmem.BACKEND,
)  # fmt: skip

_NAME = re.compile("[a-z][a-z0-9_]*")
_RESERVED = frozenset({"config", "type"})  # keys beside it in a configuration

_known: dict[str, Backend] = {name: each for each in _BUILT_IN for name in each.names}
"""Every backend, by each of its names."""


def register(backend: Backend) -> None:
    """Make a backend known to this process.

    Raises:
        ConfigError: one of its names is taken or is no name, or the record contradicts itself.
    """
    for name in backend.names:
        if not _NAME.fullmatch(name) or name in _RESERVED:
            raise ConfigError(
                f"backend {name!r}: expected a name of small letters, digits and underscores"
            )
        if _known.get(name, backend) != backend:
            raise ConfigError(f"backend {name!r}: there is another one of this name")
    if backend.files != issubclass(backend.config, PathModel):
        raise ConfigError(
            f"backend {backend.name!r}: its settings must derive from PathModel if it has"
            " `existing`, and only then"
        )
    if backend.files and backend.spelled and "create_if_missing" not in backend.config.model_fields:
        raise ConfigError(
            f"backend {backend.name!r}: its settings need create_if_missing, or spelled=False"
        )
    _known.update(dict.fromkeys(backend.names, backend))


def find(name: str) -> Backend | None:
    """The backend of this name, which may be an alias; None if there is none.

    Raises:
        ConfigError: an installed package announces it, and it cannot be loaded.
    """
    found = _known.get(name)
    if found is None and _NAME.fullmatch(name):
        for entry in _entry_points():
            if entry.name == name:
                found = _load(entry)
    return found


def names() -> list[str]:
    """Every name that a configuration may use, without loading what packages announce."""
    return list(dict.fromkeys([*_known, *(entry.name for entry in _entry_points())]))


def loaded() -> list[Backend]:
    """The backends that are known without loading anything."""
    return list(dict.fromkeys(_known.values()))


def checked_by_fsck() -> list[str]:
    """What catalogues of backends record that ``warabi fsck`` can check."""
    return [backend.name for backend in loaded() if backend.fsck]


def spellings(path: str) -> list[str]:
    """How the backends that mounts and ``warabi serve --target`` take are spelled."""
    return [f"{b.name}:{path if b.files else ''}" for b in loaded() if b.spelled]


def every() -> Iterator[Backend]:
    """All of them: first those that are known, then those that have to be loaded."""
    yield from (seen := loaded())
    for entry in _entry_points():
        if entry.name not in _known and (found := _load(entry)) not in seen:
            yield found


def _entry_points() -> metadata.EntryPoints | tuple[()]:
    """Those of installed packages; none for a program that has more rights than its user, who may
    say by the environment where packages are."""
    if os.getuid() != os.geteuid() or os.getgid() != os.getegid():
        return ()
    return metadata.entry_points(group=GROUP)


def _load(entry: metadata.EntryPoint) -> Backend:
    try:
        found = entry.load()
    except Exception as error:
        raise ConfigError(
            f"backend {entry.name!r}: {entry.value} cannot be loaded: {error}"
        ) from error
    if not isinstance(found, Backend) or found.name != entry.name:
        raise ConfigError(
            f"backend {entry.name!r}: {entry.value} is no warabi.backends.Backend of that name"
        )
    register(found)
    return found
