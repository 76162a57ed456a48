"""Scripts as the documented API has them: run as they are, they must just work.

Nothing is finalized unless the documentation's script does it.  Each runs in its own process,
which has to end by itself, with status 0 and without a word on its standard error.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.helpers import run_python

MEMORY = """
import mochi.margo
from mochi.warabi.client import Client
from mochi.warabi.server import Provider

engine = mochi.margo.Engine("na+sm", mochi.margo.server)
config = {"target": {"type": "memory", "config": {}}}
provider = Provider(engine=engine, provider_id=42, config=config)
client = Client(engine=engine)
target = client.make_target_handle(address=str(engine.addr()), provider_id=42)

region = target.create(size=64)
target.write(region=region, offset=0, data=b"Hello, Warabi!", persist=True)
assert target.read(region=region, offset=0, size=14) == b"Hello, Warabi!"
target.persist(region=region, offset=0, size=64)
target.erase(region=region)
print("ok")
"""

FINALIZED = """
from mochi.margo import Engine, server
from mochi.warabi.client import Client, TargetHandle, RegionID
from mochi.warabi.server import Provider

with Engine("tcp", server) as engine:
    provider = Provider(engine, 1, {"target": {"type": "memory"}})
    address = engine.addr()
    client = Client(engine)
    target = client.make_target_handle(str(address), 1)
    assert target and isinstance(target, TargetHandle) and not TargetHandle()
    region = target.create_and_write(b"data")
    assert isinstance(region, RegionID)
    assert RegionID(region.to_bytes()) == region
    assert isinstance(client.get_config(), str)
engine.finalize()
print("ok")
"""

TEMPORARY_FILE = """
import os, tempfile
import mochi.margo
from mochi.warabi.client import Client
from mochi.warabi.server import Provider

engine = mochi.margo.Engine("na+sm", mochi.margo.server)
with tempfile.NamedTemporaryFile(delete=False) as file:
    path = file.name
provider = Provider(engine, 7, {
    "target": {
        "type": "abtio",
        "config": {"path": path, "create_if_missing": True, "override_if_exists": True},
    }
})
assert os.path.getsize(path) > 0
target = Client(engine).make_target_handle(str(engine.addr()), 7)
region = target.create_and_write(b"persistent", persist=True)
assert target.read(region, 0, 10) == b"persistent"
os.unlink(path)
print("ok")
"""

ASYNCHRONOUS = """
import time
import mochi.margo
from mochi.warabi.client import AsyncCreateRequest, AsyncRequest, Client
from mochi.warabi.server import Provider

engine = mochi.margo.Engine("na+sm", mochi.margo.server)
provider = Provider(engine, 42, {"target": {"type": "memory", "config": {}}})
client_engine = mochi.margo.Engine("na+sm", mochi.margo.client)
target = Client(client_engine).make_target_handle(str(engine.addr()), 42)

create = target.create_async(size=1 << 20)
assert isinstance(create, AsyncCreateRequest)
region = create.wait()
write = target.write_async(region=region, offset=0, data=b"x" * (1 << 20), persist=False)
assert isinstance(write, AsyncRequest)
while not write.completed():
    time.sleep(0.001)
write.wait()
buffer = bytearray(1 << 20)
request = target.read_async(region=region, offset=0, buffer=buffer)
request.wait()
assert buffer == b"x" * (1 << 20)
target.persist_async(region=region, offset=0, size=1 << 20).wait()
requests = [target.write_async(region, i * 1024, bytes([i]) * 1024) for i in range(100)]
for request in requests:
    request.wait()
target.erase_async(region=region).wait()
target.create_async(10)  # dropped
print("ok")
"""

NUMPY = """
import numpy as np
import mochi.margo
from mochi.warabi.client import Client
from mochi.warabi.server import Provider

engine = mochi.margo.Engine("na+sm", mochi.margo.server)
provider = Provider(engine, 42, {"target": {"type": "memory", "config": {}}})
target = Client(engine).make_target_handle(str(engine.addr()), 42)
data = np.random.rand(100, 50)
region = target.create(data.nbytes)
target.write(region, 0, data)
back = np.empty_like(data)
target.read_into(region, 0, back)
assert (back == data).all()
target.read_into(region, 0, back.data)
target.read_async(region=region, offset=0, buffer=back).wait()
assert (np.frombuffer(target.read(region, 0, data.nbytes)).reshape(100, 50) == data).all()
target.write(region, 8, memoryview(data)[:1].cast("B")[8:16])
try:
    target.write(region, 0, data[:, ::2])
except Exception:
    print("ok")
"""

PIPELINE = """
import json, sys
import mochi.margo
from mochi.warabi.client import Client
from mochi.warabi.server import Provider

engine = mochi.margo.Engine("ofi+tcp", mochi.margo.server)
config = {
    "target": {"type": "abtio", "config": {"path": sys.argv[1], "create_if_missing": True}},
    "transfer_manager": {
        "type": "pipeline",
        "config": {
            "num_pools": 2, "num_buffers_per_pool": 8, "first_buffer_size": 4096,
            "buffer_size_multiplier": 2,
        },
    },
}
provider = Provider(engine, 1, json.dumps(config))
assert provider and provider.get_config()["transfer_manager"] == config["transfer_manager"]
target = Client(engine).make_target_handle(str(engine.addr()), 1)
target.set_eager_write_threshold(size=4096)
target.set_eager_read_threshold(size=4096)
for size in (100, 5000, 10_000_000):
    region = target.create_and_write(bytes(size), persist=True)
    assert target.read(region, 0, size) == bytes(size)
print("ok")
"""

ERRORS = """
import mochi.margo
import mochi.warabi.client as client_module
import mochi.warabi.server as server_module
from mochi.warabi.client import Client, RegionID
from mochi.warabi.server import Provider

engine = mochi.margo.Engine("na+sm", mochi.margo.server)
provider = Provider(engine, 1, {"target": {"type": "memory", "config": {}}})
target = Client(engine).make_target_handle(str(engine.addr()), 1)
region = target.create(10)
for call in (
    lambda: target.write(region, 8, b"beyond"),
    lambda: target.read(region, 0, 11),
    lambda: target.read(RegionID(), 0, 1),
    lambda: target.erase(RegionID(b"0123456789abcdef")),
    lambda: Client(engine).make_target_handle(str(engine.addr()), 99).create(1),
    lambda: target.create_async(1 << 62).wait(),
):
    try:
        call()
    except client_module.Exception as error:
        assert str(error)
    else:
        raise AssertionError("no exception")
try:
    Provider(engine, 2, {"target": {"type": "unknown"}})
except server_module.Exception:
    print("ok")
"""

BOTH_SIDES = """
import subprocess, sys
import mochi.margo
from mochi.warabi.client import Client

SERVER = '''
import sys
import mochi.margo
from mochi.warabi.server import Provider
engine = mochi.margo.Engine(sys.argv[1], mochi.margo.server)
engine.enable_remote_shutdown()
provider = Provider(engine, 42, {"target": {"type": "memory", "config": {}}})
print(engine.addr(), flush=True)
engine.wait_for_finalize()
'''
for transport in ("na+sm", "tcp", "ofi+tcp"):
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, transport], stdout=subprocess.PIPE, text=True
    )
    address = server.stdout.readline().strip()
    with mochi.margo.Engine(transport, mochi.margo.client) as engine:
        target = Client(engine).make_target_handle(address, 42)
        region = target.create_and_write(b"over there")
        assert target.read(region, 0, 10) == b"over there"
        engine.lookup(address).shutdown()
    server.stdout.close()
    assert server.wait(30) == 0
print("ok")
"""

POOL = """
import pickle
from concurrent.futures import ThreadPoolExecutor
import mochi.margo
from mochi.warabi.client import Client
from mochi.warabi.server import Provider

engine = mochi.margo.Engine("na+sm", mochi.margo.server)
provider = Provider(engine, 42, {"target": {"type": "memory", "config": {}}})
target = Client(mochi.margo.Engine("na+sm", mochi.margo.client)).make_target_handle(
    str(engine.addr()), 42
)
with ThreadPoolExecutor(8) as pool:
    regions = list(pool.map(lambda i: target.create_and_write(b"%d" % i * 1000), range(200)))
    assert len(set(regions)) == 200
    read = pool.map(lambda region: target.read(pickle.loads(pickle.dumps(region)), 0, 1), regions)
    assert list(read) == [b"%d" % i for i in range(10)] + [b"%d" % (i // 10 if i < 100 else 1)
                                                           for i in range(10, 200)]
print("ok")
"""

SCRIPTS = {
    "memory": MEMORY,
    "finalized": FINALIZED,
    "temporary file": TEMPORARY_FILE,
    "asynchronous": ASYNCHRONOUS,
    "numpy": NUMPY,
    "pipeline": PIPELINE,
    "errors": ERRORS,
    "both sides": BOTH_SIDES,
    "pool": POOL,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(tmp_path: Path, name: str) -> None:
    done = run_python(SCRIPTS[name], str(tmp_path / "target"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def test_client_import_is_light() -> None:
    """What only providers need takes time to import: a client does without it."""
    script = """
import sys
import mochi.margo
import mochi.warabi.client
print(*({"trio", "pydantic", "numpy", "sqlite3", "ssl"} & sys.modules.keys()))
"""
    done = run_python(script)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_mochi_is_a_namespace_package(tmp_path: Path) -> None:
    """Other distributions may have ``mochi.*`` packages of their own."""
    (tmp_path / "mochi" / "other").mkdir(parents=True)
    (tmp_path / "mochi" / "other" / "__init__.py").write_text("here = True")
    script = """
import sys
sys.path.append(sys.argv[1])
import mochi.margo, mochi.other
print(mochi.other.here)
"""
    done = run_python(script, str(tmp_path))
    assert (done.stdout, done.stderr) == ("True\n", "")
