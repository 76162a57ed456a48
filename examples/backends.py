"""Where the bytes are: in memory, files or persistent memory; and what a provider says to a
configuration that is wrong."""

import os
import tempfile
from typing import Any

import mochi.margo
from mochi.warabi.client import Client
from mochi.warabi.server import Exception, Provider

with tempfile.TemporaryDirectory() as directory:
    path = os.path.join(directory, "blobs")
    configs: dict[str, dict[str, Any]] = {
        "memory": {"target": {"type": "memory"}},
        "memory with a quota": {"target": {"type": "memory", "config": {"capacity": 100_000}}},
        "persistent memory": {
            "target": {
                "type": "pmem",
                "config": {"path": f"{path}.pmem", "create_if_missing_with_size": 8 << 20},
            }
        },
        "files": {"target": {"type": "abtio", "config": {"path": path, "create_if_missing": True}}},
    }
    with mochi.margo.Engine("na+sm", mochi.margo.server) as engine:
        client = Client(engine)
        for provider_id, (name, config) in enumerate(configs.items()):
            provider = Provider(engine, provider_id, config)
            target = client.make_target_handle(str(engine.addr()), provider_id)
            region = target.create_and_write(bytes(60_000), persist=True)
            print(f"{name}: a region of {target.size(region)} bytes")
            try:
                target.create(60_000)
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {error}")
        print("on disk:", sorted(os.listdir(directory)))

        try:
            Provider(engine, 9, {"target": {"type": "memory", "config": {"capacity": "much"}}})
        except Exception as error:
            print(f"refused: {error}")
