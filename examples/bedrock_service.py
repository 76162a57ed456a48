"""A service from one configuration, in the JSON that Mochi's Bedrock takes.

In a file, ``warabi serve config.json`` would do the same on the command line.
"""

import json
import logging
import tempfile

import mochi.margo
from mochi.warabi.client import Client
from warabi.bedrock import Server

logging.getLogger("warabi.bedrock").setLevel(logging.ERROR)  # "pool has no effect here"

with tempfile.TemporaryDirectory() as directory:
    config = f"""
    {{
        "libraries": ["libwarabi-bedrock-module.so"],
        "providers": [
            {{
                "name": "scratch",
                "type": "warabi",
                "provider_id": 1,
                "pool": "__primary__",
                "config": {{"target": {{"type": "memory"}}}}
            }},
            {{
                "name": "archive",
                "type": "warabi",
                "tags": ["durable"],
                "config": {{
                    "target": {{
                        "type": "abtio",
                        "config": {{"path": "{directory}/archive", "create_if_missing": true}}
                    }}
                }}
            }}
        ]
    }}
    """
    with (
        Server("na+sm", config) as server,
        mochi.margo.Engine("na+sm", mochi.margo.client) as engine,
    ):
        client = Client(engine)
        for name, provider in server.providers.items():
            target = client.make_target_handle(str(server.address), provider.provider_id)
            region = target.create_and_write(name.encode(), persist=True)
            print(f"{name}, provider {provider.provider_id}:", target.read(region, 0, len(name)))
        print(json.dumps(server.get_config()["providers"][0]["config"]["target"]))
