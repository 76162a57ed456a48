"""The table of backends: the library's own, those that a program registered, and those of
installed packages.

A package declares a backend by an entry point of the group ``warabi.backends``, whose name is the
backend's and whose object is its :class:`~warabi.backends.record.Backend`.  Entry points are read
only when an unknown name is used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib import metadata

from warabi.backends import file, memory, pmem, rados
from warabi.backends.record import Backend
from warabi.backends.settings import PathModel
from warabi.errors import ConfigError

GROUP = "warabi.backends"
"""The group of entry points."""

_BUILT_IN: tuple[Backend, ...] = (
    memory.BACKEND,
    file.BACKEND,
    pmem.BACKEND,
    rados.BACKEND,
)  # fmt: skip

_NAME = re.compile("[a-z][a-z0-9_]*")
_RESERVED = frozenset({"config", "type"})  # other keys of the same section of a configuration

_known: dict[str, Backend] = {name: each for each in _BUILT_IN for name in each.names}
"""All backends, by each of their names."""


def register(backend: Backend) -> None:
    """Register a backend in this process.

    Raises:
        ConfigError: a name is in use or not valid, or the record is inconsistent.
    """
    for name in backend.names:
        if not _NAME.fullmatch(name) or name in _RESERVED:
            raise ConfigError(
                f"backend {name!r}: expected a name of small letters, digits and underscores"
            )
        if _known.get(name, backend) != backend:
            raise ConfigError(f"backend {name!r}: a backend of this name is already registered")
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
    """Return the backend of this name or alias; None if there is none.

    Raises:
        ConfigError: an installed package declares it, and it cannot be loaded.
    """
    found = _known.get(name)
    if found is None and _NAME.fullmatch(name):
        for entry in _entry_points():
            if entry.name == name:
                found = _load(entry)
    return found


def names() -> list[str]:
    """Return all names that a configuration may use, without loading packages."""
    return list(dict.fromkeys([*_known, *(entry.name for entry in _entry_points())]))


def loaded() -> list[Backend]:
    """Return the backends that are known without loading packages."""
    return list(dict.fromkeys(_known.values()))


def checked_by_fsck() -> list[str]:
    """Return the names, as in catalogues, of backends that ``warabi fsck`` can check."""
    return [backend.name for backend in loaded() if backend.fsck]


def spellings(path: str) -> list[str]:
    """Return the forms of targets that mounts and ``warabi serve --target`` accept."""

    def place(backend: Backend) -> str:
        return path if backend.files else "POOL/NAME" if backend.placed else ""

    return [f"{b.name}:{place(b)}" for b in loaded() if b.spelled]


def every() -> Iterator[Backend]:
    """Yield all backends: first the known ones, then those of packages, which it loads."""
    yield from (seen := loaded())
    for entry in _entry_points():
        if entry.name not in _known and (found := _load(entry)) not in seen:
            yield found


def _entry_points() -> metadata.EntryPoints | tuple[()]:
    """Return the entry points of installed packages; none in a set-ID program, whose user could
    control by the environment which packages are loaded."""
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
            f"backend {entry.name!r}: {entry.value} is not a warabi.backends.Backend of that name"
        )
    register(found)
    return found
