"""A target on a file system: what its path may be, who owns it, and how it is opened.

``path`` is the catalogue.  Regions live in ``path + ".regions/"``, and the lock that makes one
process the owner is the file ``LOCK`` in there: SQLite's own locks are on the catalogue file,
where closing any other descriptor of it would drop them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from warabi import errors
from warabi.backends import FileStorage, MemoryStorage, PmemStorage
from warabi.backends.direct import open_storage
from warabi.catalogue import APPLICATION_ID, SCHEMA_VERSION, Catalogue
from warabi.config import FileConfig, FileTarget, MemoryConfig, PmemConfig, PmemTarget
from warabi.errors import ConfigError, PermissionDenied, TargetBusy
from warabi.target import Target

_CLOSING_PATIENCE = 60.0
"""Seconds to wait for an owner that has begun to close, when asked to wait at all."""


class _Plan(NamedTuple):
    """What the settings of a backend on a file system come down to."""

    path: str
    backend: str
    """The type that the catalogue records."""
    create: bool
    creation: str
    """The setting that asks for *create*."""
    override: bool
    make: Callable[[Path], tuple[FileStorage, dict[str, Any]]]
    """Opens the storage; also gives the settings that it has instead of those asked for."""
    pool: int | None = None
    """The quota in bytes that a new target has for ever."""
    capacity: int | None = None
    """The quota in bytes while it is open this time."""
    threads: int | None = None
    """How many calls may wait for the medium at once."""


def open_target(target: FileTarget | PmemTarget) -> Target:
    """The target that a provider's configuration names; raises as :func:`open_file`."""
    if isinstance(target, PmemTarget):
        return open_pmem(target.config)
    return open_file(target.config)


def open_memory(config: MemoryConfig) -> Target:
    """An empty target in memory."""
    return Target(Catalogue(None), MemoryStorage(), capacity=config.capacity)


def open_file(config: FileConfig, *, patience: float = 0.0) -> Target:
    """The target at ``config.path``, created where the configuration says so.

    Args:
        config: the backend's settings.
        patience: seconds to wait for another owner to let go.

    Raises:
        ConfigError: the path is no target of this type (it is left as it is), or is missing and
            not to be created.
        TargetBusy: another process, named by its pid, has it open.
        CorruptTarget, StorageError, StorageFull, PermissionDenied: the medium.
    """

    def make(root: Path) -> tuple[FileStorage, dict[str, Any]]:
        return open_storage(
            root, direct=config.directio, sync=config.sync, alignment=config.alignment
        )

    plan = _Plan(
        config.path, "file", config.create_if_missing, "create_if_missing",
        config.override_if_exists, make, capacity=config.capacity,
        threads=config.abt_io.backing_thread_count,
    )  # fmt: skip
    return _open(plan, patience)


def open_pmem(config: PmemConfig, *, patience: float = 0.0) -> Target:
    """As :func:`open_file`.  The size that the target was created with is its quota, whatever the
    configuration says later; an empty file that becomes a target without a size has none."""
    size = config.create_if_missing_with_size
    plan = _Plan(
        config.path, "pmem", bool(size), "create_if_missing_with_size", config.override_if_exists,
        lambda root: (PmemStorage(root), {}), pool=size or None,
    )  # fmt: skip
    return _open(plan, patience)


def _open(plan: _Plan, patience: float) -> Target:
    path = Path(plan.path)
    if "\0" in plan.path:
        raise ConfigError("configuration: $.target.config.path: contains a null byte")
    if plan.override and not plan.create:
        raise ConfigError(
            f"configuration: $.target.config.override_if_exists needs {plan.creation}"
        )
    try:
        state = _inspect(path)
        path = Path(os.path.realpath(path))  # the regions are beside the catalogue, not the link
        if state == "missing" and not plan.create:
            raise ConfigError(f"target {path}: no such file, and {plan.creation} is not set")
        if state == "missing":
            path.parent.mkdir(parents=True, exist_ok=True)
        return _open_locked(path, plan, patience)
    except OSError as error:
        if isinstance(error, errors.Exception):
            raise
        raise errors.from_os(error, f"target {path}") from error


def _inspect(path: Path) -> str:
    """``missing``, ``empty`` or ``target``; refuses what is something else."""
    try:
        info = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise ConfigError(f"target {path}: a dangling symbolic link") from None
        return "missing"
    except NotADirectoryError:
        raise ConfigError(f"target {path}: a part of its path is not a directory") from None
    if stat.S_ISDIR(info.st_mode):
        raise ConfigError(f"target {path}: is a directory")
    if not stat.S_ISREG(info.st_mode):
        raise ConfigError(f"target {path}: is not a regular file")
    if info.st_size == 0:
        return "empty"
    if not os.access(path, os.R_OK | os.W_OK):
        raise PermissionDenied(f"target {path}: cannot be read and written by this user")
    with open(path, "rb") as file:
        header = file.read(100)
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        raise ConfigError(f"target {path}: the file is not a warabi target; it was left untouched")
    version, application = struct.unpack(">I4xI", header[60:72])
    if application != APPLICATION_ID:
        raise ConfigError(
            f"target {path}: the database is not a warabi target; it was left untouched"
        )
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"target {path}: written by a newer version (schema {version}, this one reads up to"
            f" {SCHEMA_VERSION})"
        )
    return "target"


def _is_ours(regions: Path) -> bool:
    """Whether a directory is a target's, or empty and so may become one's."""
    return regions.is_dir() and ((regions / "LOCK").is_file() or not any(regions.iterdir()))


def _open_locked(path: Path, plan: _Plan, patience: float) -> Target:
    regions = Path(f"{path}.regions")
    made = not regions.exists()
    if not made and not _is_ours(regions):
        raise ConfigError(
            f"target {path}: {regions}, where its regions would be, is something else; it was left"
            " untouched"
        )
    regions.mkdir(mode=0o700, exist_ok=True)
    lock = _Lock(path, regions / "LOCK", patience)
    try:
        state = _inspect(path)  # again, now that nobody else can change it
        if state != "target" or plan.override:
            FileStorage(regions).destroy()
            Catalogue.create(path, plan.backend, plan.pool)
        storage, instead = plan.make(regions)
        catalogue = Catalogue(path, plan.backend)
    except BaseException:
        lock.release()
        if made:
            with contextlib.suppress(OSError):
                lock.remove()
                regions.rmdir()
        raise

    held = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def closed() -> None:
        # Callers may remove the catalogue while it is open, as one does with a temporary file:
        # nothing can ever reach the regions then, and they go too.
        removed = os.fstat(held).st_nlink == 0
        os.close(held)
        if removed:
            with contextlib.suppress(OSError):
                FileStorage(regions).destroy()
                Path(f"{path}-wal").unlink(missing_ok=True)
                lock.remove()
                regions.rmdir()
        lock.release()

    try:
        capacity = catalogue.capacity if plan.capacity is None else plan.capacity
        return Target(
            catalogue,
            storage,
            capacity=capacity,
            threads=plan.threads,
            instead=instead,
            on_close=closed,
            on_closing=lock.closing,
        )
    except BaseException:
        catalogue.abandon()
        storage.close()
        os.close(held)
        lock.release()
        raise


class _Lock:
    """Ownership of a target, for as long as this object or its process lives."""

    def __init__(self, path: Path, file: Path, patience: float) -> None:
        self._file = file
        self._fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + patience
        closing_deadline = time.monotonic() + (_CLOSING_PATIENCE if patience else 0.0)
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    os.close(self._fd)
                    raise
            owner = os.pread(self._fd, 100, 0).decode(errors="replace").strip()
            limit = closing_deadline if owner.endswith("closing") else deadline
            if time.monotonic() >= limit:
                os.close(self._fd)
                raise TargetBusy(f"target {path}: already open in process {owner or 'unknown'}")
            time.sleep(0.02)
        self._write(f"{os.getpid()}\n")

    def _write(self, text: str) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text.encode(), 0)

    def closing(self) -> None:
        """Tell whoever waits that the end is near."""
        self._write(f"{os.getpid()}, which is closing\n")

    def remove(self) -> None:
        self._file.unlink(missing_ok=True)

    def release(self) -> None:
        os.close(self._fd)
