"""Files that are stored by one call are whole, or the old ones, whatever ends meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash import powerloss
from tests.crash.targets import accounted, opened
from tests.crash.test_powerloss import BEGIN, found_after
from tests.crash.workload import on_target
from tests.support.helpers import eventually, file_config, provider_process, python_process
from warabi.client import Client
from warabi.engine import Engine, client

_STORING = """
import sys
from warabi.client import Client
from warabi.engine import Engine, client
address, size = sys.argv[1], int(sys.argv[2])
target = Client(Engine("na+sm", client)).make_target_handle(address, 1)
for number in range(10**9):
    target.store_name(f"/{number % 4}", bytes([number % 251]) * size)
    print(number, flush=True)
"""


@pytest.mark.parametrize("backend", ["file", "loose", "pmem"])
def test_a_power_failure_leaves_the_old_file_or_the_new_one(
    backend: str, tmp_path: Path, scratch: Path
) -> None:
    """It was stored durably: its bytes are safe before it has the name."""
    program = f"""{BEGIN}
from warabi.target.named_files import store
target = opened(backend, path)
for i in range(4):
    store(target, "/name", 0o600, 0, 0, False, True, b"%04d" % i * 500)
    say(f"{{i}}")
die()
"""
    arguments = [backend, f"{tmp_path}/disk/target"]
    events = powerloss.recorded(tmp_path, ["-c", program, *arguments], killed=1)
    seen: set[int] = set()
    for said, found, _ in found_after(backend, tmp_path, scratch, events, 3):
        if said or found.names:
            number = int(found.regions[found.names["name"]][:4])
            assert found.regions == {found.names["name"]: b"%04d" % number * 500}
            assert number - int(said or -1) in (0, 1), said
            seen.add(number)
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("size", [1000, 300_000, 5 << 20])
@pytest.mark.parametrize("victim", ["client", "provider"])
def test_a_kill_leaves_no_part_of_a_file(victim: str, size: int, tmp_path: Path) -> None:
    path = tmp_path / "target"
    with provider_process("na+sm", file_config(path)) as served:
        with python_process("-c", _STORING, served.address, str(size)) as storing:
            assert storing.stdout is not None
            for _ in range(9):
                assert storing.stdout.readline()
            (served.process if victim == "provider" else storing).kill()
        if victim == "client":  # what it was about to store goes with its connection
            with Engine("na+sm", client) as engine:
                target = Client(engine).make_target_handle(served.address, 1)
                eventually(lambda: len(list(target.list())) == 4)
                assert sorted(target.list_names()) == ["0", "1", "2", "3"]
                assert target.link.call("used") == 4 * size
    with opened("file", path) as reopened:
        found = on_target(reopened).look()
        for name, region in found.names.items():
            data = found.regions[region]
            assert data == data[:1] * size, name
        assert set(found.names.values()) == set(found.regions)
        accounted(path, reopened, found.regions)
