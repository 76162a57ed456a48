"""``warabifs install-helper``: files that let mount(8) and man(1) find this environment."""

from __future__ import annotations

import os
import shlex
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from warabi._core.output import write_file
from warabi.errors import ConfigError
from warabifs.mount import manual

MARK = "Installed by `warabifs install-helper`, which `--uninstall` undoes."
_HELPERS = {
    "sbin/mount.warabifs": "mount",
    "sbin/mount.fuse.warabifs": "mount",  # so mount(8) does not depend on mount.fuse3 and PATH
    "sbin/umount.fuse.warabifs": "umount",  # the type in the mount table
    "sbin/umount.warabifs": "umount",
}


def _files(prefix: Path) -> dict[Path, tuple[str, int]]:
    """Return content and mode of every file to install."""
    # -P: do not import modules from the directory in which mount(8) was called.
    python = f"{shlex.quote(os.path.abspath(sys.executable))} -P -m warabifs.mount.helper"
    files = {
        prefix / name: (f'#!/bin/sh\n# {MARK}\nexec {python} {what} "$@"\n', 0o755)
        for name, what in _HELPERS.items()
    }
    system = prefix == Path("/")
    share = prefix / "usr/local/share" if system else prefix / "share"
    files[share / "man/man8/mount.warabifs.8"] = (f'.\\" {MARK}\n{manual.page()}', 0o644)
    return files


def _ours(path: Path) -> bool:
    """Whether an existing file was installed by this command."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        return MARK in path.read_text(errors="replace")[:500]
    except OSError:
        return False


def _check(paths: list[Path]) -> None:
    for path in paths:
        if os.path.lexists(path) and not _ours(path):
            raise ConfigError(
                f"{path}: was not installed by `warabifs install-helper`; it was not modified"
            )


def install(prefix: Path) -> Iterator[str]:
    """Write the files below *prefix*; yields a line for each that changed.

    Raises:
        ConfigError: a file exists that was not installed by this command, and nothing was changed;
            or a directory cannot be created.
        PermissionDenied, StorageFull, StorageError: a file cannot be written.
    """
    prefix = prefix.absolute()
    files = _files(prefix)
    _check(list(files))
    for path, (text, mode) in files.items():
        if path.exists() and path.read_text() == text and path.stat().st_mode & 0o777 == mode:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, text.encode(), mode)
            path.chmod(mode)  # a file that is replaced keeps its mode
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
        yield f"{path}: installed"


def uninstall(prefix: Path) -> Iterator[str]:
    """Remove the files below *prefix*; yields a line for each that existed.

    Raises:
        ConfigError: a file was not installed by this command, and nothing was changed; or a file
            cannot be removed.
    """
    paths = list(_files(prefix.absolute()))
    _check(paths)
    for path in paths:
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
        yield f"{path}: removed"
