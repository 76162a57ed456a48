"""Opening targets on a file system: valid paths, ownership, and creation.

``path`` is the catalogue.  Regions are in ``path + ".regions/"``, and the lock that makes one
process the owner is the file ``LOCK`` in there: SQLite's own locks are on the catalogue file,
where closing any other descriptor of it would release them.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from warabi import errors
from warabi.backends import Backend, Plan, Storage, file, pmem, registry
from warabi.backends.checksummed import storage_with_sums
from warabi.backends.file import FileStorage
from warabi.backends.packed import PackedStorage
from warabi.errors import ConfigError, CorruptTarget, PermissionDenied
from warabi.metadata import schema
from warabi.metadata.catalogue import Catalogue
from warabi.metadata.journal import close_quietly, sync_directory
from warabi.metadata.replica import Replica
from warabi.metadata.schema import APPLICATION_ID, SCHEMA_VERSION
from warabi.target.config import FileConfig, PmemConfig, TargetConfig
from warabi.target.lockfile import LockFile
from warabi.target.target import Target

_MEMORY = 1 << 30
"""Bytes that a file system in memory must have for catalogues to be copied there."""


class Opening(NamedTuple):
    """Parameters for opening a target on a file system."""

    path: str
    backend: Backend
    settings: Any
    plan: Plan

    def storage(self, regions: Path) -> Storage:
        """Opens its storage in the directory *regions*."""
        return self.backend.open(self.settings, regions)


def opening_of(backend: Backend, settings: Any) -> Opening:
    """Return the parameters for a target of a persistent backend, from validated settings."""
    return Opening(settings.path, backend, settings, backend.plan(settings))


def open_target(target: TargetConfig) -> Target:
    """Open the target of a provider's configuration; raises as :func:`open_backend`."""
    return open_backend(target.backend, target.config)


def open_backend(
    backend: Backend, settings: Any, *, patience: float = 0.0, limit: int | None = None
) -> Target:
    """Open a target of a backend; creates it if the settings say so, or if it has no path.

    Args:
        backend: its type.
        settings: an instance of ``backend.config``.
        patience: seconds to wait for another owner to release its path.
        limit: most bytes of memory for its regions and names, holes not counted; by default what
            the machine can provide.  Only for backends with ``in_memory``.

    Raises:
        ConfigError: the path is not a target of this type (it is not modified), or is missing and
            must not be created.
        TargetBusy: another process, named by its PID, has it open.
        CorruptTarget, StorageError, StorageFull, PermissionDenied: storage errors.
    """
    if backend.files:
        return _open(opening_of(backend, settings), patience)
    if backend.remote is not None:
        return _open_remote(backend, settings, patience)
    catalogue = Catalogue(None)
    if backend.in_memory is not None:
        storage = backend.in_memory(limit, catalogue.memory)
    else:
        storage = backend.open(settings, Path())
    return volatile(catalogue, storage, backend.plan(settings).capacity)


def volatile(catalogue: Catalogue, storage: Storage, capacity: int | None) -> Target:
    """Open a target that ends with its process."""
    catalogue.limit(storage.charge)
    return Target(catalogue, storage, capacity=capacity, instead=storage.instead)


def open_file(config: FileConfig) -> Target:
    """Open the target of files at ``config.path``; see :func:`open_backend`."""
    return open_backend(file.BACKEND, config)


def open_pmem(config: PmemConfig) -> Target:
    """Open a pmem target.  The size that it was created with is its permanent quota, whatever the
    configuration says later; an empty file that becomes a target without a size has none."""
    return open_backend(pmem.BACKEND, config)


def _open(opening: Opening, patience: float) -> Target:
    path, plan = Path(opening.path), opening.plan
    if "\0" in opening.path:
        raise ConfigError("configuration: $.target.config.path: contains a null byte")
    if plan.override and not plan.create:
        raise ConfigError(
            f"configuration: $.target.config.override_if_exists requires {plan.creation}"
        )
    try:
        state = inspect(path)
        path = Path(os.path.realpath(path))  # regions are next to the catalogue, not the link
        if state == "missing" and not plan.create:
            raise ConfigError(f"target {path}: no such file, and {plan.creation} is not set")
        if state == "missing":
            _make_directories(path.parent)
        return _open_locked(path, opening, patience)
    except OSError as error:
        if isinstance(error, errors.Exception):
            raise
        raise errors.from_os(error, f"target {path}") from error


def _open_remote(backend: Backend, settings: Any, patience: float) -> Target:
    """Open a target on another system."""
    assert backend.remote is not None
    plan = backend.plan(settings)
    held = backend.remote(settings, patience)
    with contextlib.ExitStack() as undo:
        undo.callback(held.release)
        with tempfile.TemporaryDirectory(prefix="warabi-", dir=_place_in_memory()) as directory:
            replica = Replica(held.store, Path(directory) / "catalogue", held.label)
            undo.callback(replica.close)
            if not replica.fetch(APPLICATION_ID, SCHEMA_VERSION):
                _make_remote(backend, plan, held.storage, replica)
            catalogue = Catalogue(Path(held.label), backend.name, replica)
        undo.callback(catalogue.abandon)
        target = Target(
            catalogue,
            held.storage,
            capacity=catalogue.capacity if plan.capacity is None else plan.capacity,
            threads=plan.threads,
            instead=held.instead,
            on_close=held.release,
        )
        undo.pop_all()
        return target


def _make_remote(backend: Backend, plan: Plan, storage: Storage, replica: Replica) -> None:
    """Create the catalogue of a target on another system."""
    if next(storage.scan(), None) is not None:
        raise CorruptTarget(f"target {replica.label}: its catalogue is missing, and regions exist")
    if not plan.create:
        raise ConfigError(
            f"target {replica.label}: was not completed, and {plan.creation} is not set"
        )
    schema.create(replica.file, backend.name, plan.pool)
    replica.publish()


def _place_in_memory() -> str | None:
    """Return the directory for temporary files that are best in memory; None for the usual one."""
    shm = "/dev/shm"
    with contextlib.suppress(OSError):
        info = os.statvfs(shm)
        if os.access(shm, os.W_OK) and info.f_bavail * info.f_frsize >= _MEMORY:
            return shm
    return None


def _make_directories(path: Path) -> None:
    """Create a directory and its missing ancestors, durably."""
    missing = [path, *path.parents]
    for directory in reversed(missing[: [a.exists() for a in missing].index(True)]):
        directory.mkdir(exist_ok=True)
        sync_directory(directory.parent)


def inspect(path: Path) -> str:
    """Return ``missing``, ``empty`` or ``target``; raises for anything else."""
    try:
        info = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise ConfigError(f"target {path}: a dangling symbolic link") from None
        return "missing"
    except NotADirectoryError:
        raise ConfigError(f"target {path}: a component of its path is not a directory") from None
    if stat.S_ISDIR(info.st_mode):
        raise ConfigError(f"target {path}: is a directory")
    if not stat.S_ISREG(info.st_mode):
        raise ConfigError(f"target {path}: is not a regular file")
    if info.st_size == 0:
        return "empty"
    if not os.access(path, os.R_OK | os.W_OK):
        raise PermissionDenied(f"target {path}: this user lacks read or write permission")
    with open(path, "rb") as file:
        header = file.read(100)
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        raise ConfigError(f"target {path}: the file is not a warabi target; it was not modified")
    version, application = struct.unpack(">I4xI", header[60:72])
    if application != APPLICATION_ID:
        raise ConfigError(
            f"target {path}: the database is not a warabi target; it was not modified"
        )
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"target {path}: written by a newer version (schema {version}, this one reads up to"
            f" {SCHEMA_VERSION})"
        )
    return "target"


def _is_ours(regions: Path) -> bool:
    """Whether a directory belongs to a target, or is empty and so may become one's."""
    return regions.is_dir() and ((regions / "LOCK").is_file() or not any(regions.iterdir()))


def lock_regions(path: Path, patience: float) -> tuple[Path, LockFile, bool]:
    """Create and lock the directory for regions; returns it, its lock, and whether it was created.

    Raises:
        ConfigError: it is not a directory of regions.
        TargetBusy: another process, named by its PID, has the target open.
    """
    regions = Path(f"{path}.regions")
    made = not regions.exists()
    if not made and not _is_ours(regions):
        raise ConfigError(
            f"target {path}: {regions}, which would hold its regions, is not a directory of"
            " regions; it was not modified"
        )
    regions.mkdir(mode=0o700, exist_ok=True)
    return regions, LockFile(path, regions / "LOCK", patience), made


def _make_private(path: Path, regions: Path) -> None:
    """Remove other users' permissions on a target's files, if this process can.

    Catalogues used to be created with default permissions; the names, sizes and IDs in them are as
    private as the data of the regions.
    """
    for place in (path, *(Path(f"{path}{end}") for end in ("-wal", "-shm", "-journal")), regions):
        with contextlib.suppress(OSError):
            mode = place.lstat().st_mode
            if (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) and mode & 0o077:
                place.chmod(stat.S_IMODE(mode) & 0o700)


def clear(path: Path, regions: Path, backend: Backend) -> None:
    """Remove what a target without a catalogue, or an unfinished migration, left."""
    _existing(backend, regions).destroy()
    # SQLite would apply a leftover log to whatever catalogue is created there.
    for leftover in (f"{path}-wal", f"{staged(path)}", f"{staged(path)}-journal"):
        Path(leftover).unlink(missing_ok=True)


def staged(path: Path) -> Path:
    """Return the path of the catalogue of a target that is being migrated to *path*."""
    return Path(f"{path}.migrating")


def _existing(backend: Backend, regions: Path) -> Storage:
    assert backend.existing is not None  # it has files
    return backend.existing(regions)


def _open_locked(path: Path, opening: Opening, patience: float) -> Target:
    plan, backend = opening.plan, opening.backend
    regions, lock, made = lock_regions(path, patience)
    try:
        state = inspect(path)  # again, now that no other process can change it
        if state != "target" or plan.override:
            if not (plan.override or staged(path).exists()) and _any_regions(backend, regions):
                raise CorruptTarget(
                    f"target {path}: its catalogue is {state}, but {regions} holds regions; run"
                    f" warabi fsck --repair {path}, or remove them"
                )
            former = _former(path, backend) if state == "target" else backend
            # The catalogue first: regions that a crash leaves are removed at the next open.
            schema.create(path, backend.name, plan.pool)
            for each in {former, backend}:
                clear(path, regions, each)
        return open_holding(path, opening, regions, lock)
    except BaseException:
        lock.release()
        if made:
            with contextlib.suppress(OSError):
                lock.remove()
                regions.rmdir()
        raise


def recorded_backend(path: Path) -> str | None:
    """Return the backend in the catalogue at *path*; None if it cannot be read, or is not
    recorded."""
    uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"  # written once, so no log is needed
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
            row = db.execute("SELECT value FROM meta WHERE key = 'backend'").fetchone()
    except sqlite3.Error:
        return None
    return row[0] if row is not None and isinstance(row[0], str) else None


def _former(path: Path, backend: Backend) -> Backend:
    """Return the backend of a target that one of *backend* replaces."""
    name = recorded_backend(path)
    found = backend if name is None else registry.find(name)
    if found is None or not found.files:
        raise ConfigError(
            f"target {path}: is of type {name!r}, which is not known here, so it cannot be replaced"
        )
    return found


def _any_regions(backend: Backend, regions: Path) -> bool:
    storage = _existing(backend, regions)
    try:
        return next(storage.scan(), None) is not None
    finally:
        storage.close()


def open_holding(path: Path, opening: Opening, regions: Path, lock: LockFile) -> Target:
    """Open an existing target, which takes over its lock; on failure the caller keeps it."""
    _make_private(path, regions)
    plan = opening.plan
    with contextlib.ExitStack() as undo:
        storage = opening.storage(regions)
        instead = storage.instead
        undo.callback(storage.close)
        catalogue = Catalogue(path, opening.backend.name)
        undo.callback(catalogue.abandon)
        held = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        undo.callback(close_quietly, held)

        def closed() -> None:
            # If the catalogue was unlinked while open, as is done with temporary files, the regions
            # cannot be reached any more, and are removed, too.
            with contextlib.suppress(OSError):
                if os.fstat(held).st_nlink == 0:
                    _existing(opening.backend, regions).destroy()
                    Path(f"{path}-wal").unlink(missing_ok=True)
                    lock.remove()
                    regions.rmdir()
            close_quietly(held)
            lock.release()

        packed = None
        if plan.packed is not None and isinstance(storage, FileStorage):
            packed = PackedStorage(storage, catalogue, packing=plan.packed)
        summed = storage_with_sums(packed or storage, catalogue, plan.checksums)
        if summed is not None:
            instead = {**instead, "checksums": True}
        target = Target(
            catalogue,
            summed or packed or storage,
            capacity=catalogue.capacity if plan.capacity is None else plan.capacity,
            threads=plan.threads,
            instead=instead,
            on_close=closed,
            on_closing=lock.closing,
        )
        if packed is not None:
            packed.bind(target.state.storage_guard)
        if summed is not None:
            summed.bind(target.state.storage_guard, target.committer.commit_catalogue)
        undo.pop_all()
        return target


@contextlib.contextmanager
def owned(path: Path) -> Iterator[tuple[Path, Path]]:
    """Lock the target at *path*, in whatever state it is, without opening it.

    Yields its path with symbolic links followed, and the directory of its regions.

    Raises:
        ConfigError: there is nothing that is, or may have been, a target.
        TargetBusy: it is open, here or elsewhere.
    """
    path = Path(os.path.realpath(path))
    regions = Path(f"{path}.regions")
    if not (regions / "LOCK").is_file() and inspect(path) != "target":
        raise ConfigError(f"target {path}: no such target")
    if regions.exists() and not _is_ours(regions):
        raise ConfigError(f"target {path}: {regions} is not a directory of regions")
    regions.mkdir(mode=0o700, exist_ok=True)
    lock = LockFile(path, regions / "LOCK", 0.0)
    try:
        yield path, regions
    finally:
        lock.release()
