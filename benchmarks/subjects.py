"""The measured configurations: same process, another process, TCP; memory and files."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import provider
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, client
from warabi.server import Provider

MEMORY: dict[str, Any] = {"target": {"type": "memory"}}
WAYS = ("same process", "two processes", "TCP")
BACKENDS = ("memory", "file")


def file_config(path: Path) -> dict[str, Any]:
    """A provider's configuration for a new file target."""
    config = {"path": str(path), "create_if_missing": True}
    return {"target": {"type": "file", "config": config}}


@dataclass(frozen=True)
class Subject:
    """One way to one target.

    Attributes:
        pids: the processes, besides this one, that do its work.
    """

    backend: str
    way: str
    target: TargetHandle
    pids: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.backend}, {self.way}"


@contextlib.contextmanager
def subjects(directory: Path) -> Iterator[list[Subject]]:
    """Every way to every backend; files are in *directory*."""
    with contextlib.ExitStack() as stack:
        found = []
        engine = stack.enter_context(Engine("na+sm"))
        for number, config in enumerate([MEMORY, file_config(directory / "same")], 1):
            stack.enter_context(Provider(engine, number, config))
            target = Client(engine).make_target_handle(str(engine.addr()), number)
            found.append(Subject(BACKENDS[number - 1], WAYS[0], target))
        for way, transport in zip(WAYS[1:], ("na+sm", "tcp"), strict=True):
            configs = [MEMORY, file_config(directory / transport)]
            address, process = stack.enter_context(provider(transport, configs))
            own = stack.enter_context(Engine(transport, client))
            for number, backend in enumerate(BACKENDS, 1):
                target = Client(own).make_target_handle(address, number)
                found.append(Subject(backend, way, target, (process.pid,)))
        yield found


@contextlib.contextmanager
def own_sockets() -> Iterator[None]:
    """Keep the local sockets of this process and its children in a place of their own."""
    before = os.environ.get("WARABI_RUNTIME_DIR")
    with tempfile.TemporaryDirectory(prefix="wrb") as directory:  # short: paths have 107 bytes
        os.environ["WARABI_RUNTIME_DIR"] = directory
        try:
            yield
        finally:
            del os.environ["WARABI_RUNTIME_DIR"]
            if before is not None:
                os.environ["WARABI_RUNTIME_DIR"] = before
