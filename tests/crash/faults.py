"""Faults of a medium, at the places where the code calls it.

A module's global name ``os`` is all that lies between its code and the system, so replacing it
there fails calls of that module alone, and costs those who do not nothing.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from warabi._core import fileio, syscalls
from warabi.backends import (
    direct_io,
    file,
    pack_format,
    packed,
    pmem,
    range_flush,
    xattr_times,
)
from warabi.metadata import journal
from warabi.target import lockfile, opening

MODULES = (
    fileio,
    file,
    pack_format,
    packed,
    pmem,
    direct_io,
    xattr_times,
    journal,
    lockfile,
    opening,
)
CALLS = {
    "open", "close", "pwrite", "pread", "preadv", "ftruncate", "posix_fallocate", "fstat",
    "statvfs", "fsync", "fdatasync", "unlink", "makedirs", "scandir", "rename", "copy_file_range",
    "setxattr", "getxattr",
}  # fmt: skip
"""Those that may fail because of the medium."""
SYNCS = {"fsync", "fdatasync", "syncfs", "msync"}


class Site(NamedTuple):
    """A place in the code that calls the system."""

    module: str
    line: int
    call: str


def sites(module: ModuleType) -> set[Site]:
    """Every place in a module that makes one of ``CALLS``."""
    assert module.__file__
    tree = ast.parse(Path(module.__file__).read_text())
    return {
        Site(module.__name__, node.lineno, node.func.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "os"
        and node.func.attr in CALLS
    }


Fault = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""What happens instead of a call, which it is given."""


def fails(number: int) -> Fault:
    """The call fails with that errno."""

    def fault(call: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if call is os.close:
            os.close(*args)  # as the kernel does it, too
        raise OSError(number, os.strerror(number))

    return fault


def short(call: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """A read or write does less than it was asked to."""
    if call is os.pwrite:
        return os.pwrite(args[0], args[1][: max(1, len(args[1]) // 2)], *args[2:])
    if call is os.preadv:
        out = args[1][0]
        return os.preadv(args[0], [out[: max(1, len(out) // 2)]], *args[2:])
    return call(*args, **options)


class Injector:
    """Counts the calls of every site, and lets one of them have a fault.

    Attributes:
        seen: how often each site was called.
        site: which has the fault; None for none, and nothing is counted.
        when: at which of its calls; 1 is the first.
        hit: whether it happened.
    """

    def __init__(self) -> None:
        self.seen: Counter[Site] = Counter()
        self.site: Site | None = None
        self.when = 1
        self.fault: Fault = fails(errno.EIO)
        self.hit = False

    def arm(self, site: Site, when: int, fault: Fault) -> None:
        self.seen.clear()
        self.site, self.when, self.fault, self.hit = site, when, fault, False

    def call(
        self, site: Site, call: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        if self.site is None:
            return call(*args, **options)
        self.seen[site] += 1
        if site == self.site and self.seen[site] == self.when:
            self.hit = True
            return self.fault(call, args, options)
        return call(*args, **options)


class _Os:
    """The module ``os`` as one other module sees it."""

    def __init__(self, injector: Injector, module: str) -> None:
        self._injector = injector
        self._module = module

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*args: Any, **options: Any) -> Any:
            site = Site(self._module, sys._getframe(1).f_lineno, name)
            return self._injector.call(site, real, args, options)

        return call


MSYNC = Site(range_flush.__name__, 0, "msync")
SYNCFS = Site(file.__name__, 0, "syncfs")


@contextlib.contextmanager
def injector() -> Iterator[Injector]:
    """An :class:`Injector` in every storage, and below a target's catalogue, for the block."""
    made = Injector()
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            patch.setattr(module, "os", _Os(made, module.__name__))
        msync, syncfs = syscalls.msync, syscalls.syncfs
        patch.setattr(syscalls, "msync", lambda *args: made.call(MSYNC, msync, args, {}))
        patch.setattr(syscalls, "syncfs", lambda *args: made.call(SYNCFS, syncfs, args, {}))
        yield made
