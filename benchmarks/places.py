"""Directories to compare: file systems of the kernel, mounts of this project, and other mounts."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import PATIENCE, Failed, provider, run, scratch
from benchmarks.subjects import MEMORY
from warabifs.mount.options import OPTIONS

TMPFS, DISK, BINDFS, RCLONE = "tmpfs", "disk", "bindfs on tmpfs", "rclone mount of tmpfs"
OURS = "warabifs memory:"
OURS_EXCLUSIVE = "warabifs memory:, exclusive"
OURS_FILE = "warabifs file:"
OURS_FILE_EXCLUSIVE = "warabifs file:, exclusive"
OURS_PASSED = "warabifs memory:, passthrough"
OURS_FILE_PASSED = "warabifs file:, passthrough"
OURS_PYFUSE3 = "warabifs memory:, pyfuse3"
OURS_TCP = "warabifs over TCP"
SHM = Path("/dev/shm")
"""A tmpfs, everywhere."""


@dataclass(frozen=True)
class Place:
    """A directory, and the processes that serve it."""

    name: str
    path: Path
    pids: tuple[int, ...] = ()


def _mounted(path: Path) -> bool:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(path) for line in lines)


def _serving(path: Path) -> list[int]:
    """The processes with *path* as a word of their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if os.fsencode(path) in (entry / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def _alive(pid: int) -> bool:
    """Whether the process runs; one that ended may wait long for its parent to notice."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _gone(pids: list[int], patience: float) -> bool:
    deadline = time.monotonic() + patience
    while any(map(_alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextlib.contextmanager
def mounted(name: str, path: Path, *command: str | Path) -> Iterator[Place]:
    """What *command*, which returns when it can be used, mounts on *path*; unmounted at the end."""
    path.mkdir()
    pids: list[int] = []
    try:
        run(*command)
        pids = _serving(path)
        if not _mounted(path) or not pids:
            raise Failed(f"{name}: nothing is mounted on {path}")
        yield Place(name, path, tuple(pids))
    finally:
        if _mounted(path):
            with contextlib.suppress(Failed):
                run("fusermount3", "-u", "-z", path)
        if not _gone(pids, PATIENCE):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def ours(
    name: str, source: str, path: Path, *options: str
) -> contextlib.AbstractContextManager[Place]:
    """A mount of this project on *path*."""
    log = path.with_suffix(".log")
    words = ",".join((f"log={log}", *options))
    return mounted(
        name, path, sys.executable, "-m", "warabifs.mount.main", source, path, "-o", words
    )


@contextlib.contextmanager
def place(name: str, memory: Path, disk: Path) -> Iterator[Place]:
    """The place of that name; *memory* and *disk* are directories to make it in.

    Raises:
        Failed: it is not installed, or not known to this version.
    """
    with contextlib.ExitStack() as stack:
        inside = stack.enter_context(scratch(memory))
        mountpoint = inside / "mnt"
        options = [word for word in ("exclusive", "passthrough") if word in name]
        if "pyfuse3" in name:
            options.append("frontend=pyfuse3")
        if unknown := [word for word in options if word.partition("=")[0] not in OPTIONS]:
            raise Failed(f"this version has no -o {unknown[0]}")
        if name == TMPFS:
            yield Place(name, inside)
            return
        if name == DISK:
            yield Place(name, stack.enter_context(scratch(disk)))
            return
        if name in (BINDFS, RCLONE):
            program = name.split()[0]
            if shutil.which(program) is None:
                raise Failed(f"{program} is not installed")
            source = inside / "source"
            source.mkdir()
            command: list[str | Path] = [program, source, mountpoint]
            if name == RCLONE:
                words = ["--vfs-cache-mode", "writes", "--cache-dir", str(inside / "cache")]
                words += ["--config", str(inside / "none"), "--daemon"]
                command = [program, "mount", source, mountpoint, *words]
            yield stack.enter_context(mounted(name, mountpoint, *command))
            return
        if name == OURS_TCP:
            address, process = stack.enter_context(provider("tcp", [MEMORY]))
            mount = ours(name, address, mountpoint, "provider_id=1", *options)
            found = stack.enter_context(mount)
            yield Place(name, found.path, (*found.pids, process.pid))
            return
        source_text = "memory:"
        if name in (OURS_FILE, OURS_FILE_EXCLUSIVE, OURS_FILE_PASSED):
            source_text = f"file:{stack.enter_context(scratch(disk))}/target"
        yield stack.enter_context(ours(name, source_text, mountpoint, *options))
