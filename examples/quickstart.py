"""The shortest way from nothing to a stored blob: a provider and a client in one process."""

import mochi.margo
from mochi.warabi.client import Client
from mochi.warabi.server import Provider

with mochi.margo.Engine("na+sm", mochi.margo.server) as engine:
    provider = Provider(engine, 1, {"target": {"type": "memory"}})

    client = Client(engine)
    target = client.make_target_handle(str(engine.addr()), 1)

    region = target.create(size=32)
    target.write(region, offset=0, data=b"hello, regions")
    print("read back:", target.read(region, offset=0, size=14))
    print("never written:", target.read(region, offset=14, size=4))

    target.erase(region)
    print("regions left:", len(list(target.list())))
