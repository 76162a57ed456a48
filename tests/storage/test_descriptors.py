"""File descriptors: bounded, and running out of them is neither a full disk nor lost data."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.helpers import PATIENCE
from warabi._core import descriptors

SCRIPT = """
import json, os, resource, sys
from warabi import errors
from warabi.backends import memory
from warabi.target import opening as layout
from warabi.target.config import FileConfig, MemoryConfig
kind, place, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
config = FileConfig(path=place + "/target", create_if_missing=True, packed=kind == "packed")
if kind == "memory":
    target = layout.open_backend(memory.BACKEND, MemoryConfig())
else:
    target = layout.open_file(config)
size = {"files": 100, "packed": 5000, "memory": 100_000}[kind]
seen = most = 0
hogs = []

def hog():
    "Take every descriptor that is left."
    try:
        while True:
            hogs.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass

def free():
    while hogs:
        os.close(hogs.pop())

def used():
    global most
    most = max(most, len(os.listdir("/proc/self/fd")) - 1)

regions = [target.create_and_write(bytes([n % 256]) * size) for n in range(3 * limit)]
used()
for full in (False, True):
    if full:
        hog()
    for number, region in enumerate(regions):
        target.write(region, 1, b"x" * (1 + full))
        if number % 12 == 0:
            target.persist(region, 0, size)
        place = bytearray(3 + full)
        target.read_into(region, 0, memoryview(place))
        expected = bytes([number % 256]) + b"x" * (1 + full) + bytes([number % 256]) * 1
        assert place == expected, (number, place, expected)
    target.sync()
    if full:
        free()
    used()
new = "nothing"
hog()
try:
    new = target.create_and_write(b"n" * size)
except errors.StorageError as error:
    new = None
    assert "open files" in str(error), error
free()
if new is not None:
    target.persist(new, 0, size)
target.persist(target.create_and_write(b"z" * size), 0, size)
target.sync()
target.close()
print(json.dumps({"most": most, "left": len(os.listdir("/proc/self/fd")) - 1}))
"""


@pytest.mark.parametrize("kind", ["files", "packed", "memory"])
def test_a_target_works_with_few_descriptors_and_with_none_left(kind: str, tmp_path: Path) -> None:
    limit = 80
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, kind, tmp_path, str(limit)],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["most"] < limit
    assert found["left"] < 12


@pytest.mark.parametrize("limits", [(64, 4096), (64, 64), (64, resource.RLIM_INFINITY)])
def test_a_process_that_serves_has_as_many_as_it_may(
    limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [limits]
    monkeypatch.setattr(resource, "getrlimit", lambda _: now[0])
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: now.__setitem__(0, wanted))
    descriptors.raise_limit()
    soft, hard = now[0]
    assert hard == limits[1]
    assert soft == (1 << 20 if hard == resource.RLIM_INFINITY else hard)
    assert descriptors.limit() == soft


def test_warabi_serve_raises_its_limit() -> None:
    script = "from warabi.tools.cli.main import main; main()"
    command = [sys.executable, "-c", script, "serve", "--address", "na+sm", "--target", "memory:"]
    with subprocess.Popen(
        ["prlimit", "--nofile=100:2000", *command], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("na+sm://")
            assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (2000, 2000)
        finally:
            process.terminate()


def test_a_program_that_uses_the_library_keeps_its_limit() -> None:
    script = """
import resource
import mochi.margo
from mochi.warabi.server import Provider
before = resource.getrlimit(resource.RLIMIT_NOFILE)
with mochi.margo.Engine("na+sm", mochi.margo.server) as engine:
    Provider(engine, 1, {"target": {"type": "memory"}})
assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
"""
    subprocess.run(
        ["prlimit", "--nofile=200:2000", sys.executable, "-c", script],
        timeout=PATIENCE, check=True, env=os.environ,
    )  # fmt: skip
