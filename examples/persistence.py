"""What survives: data are durable when persist returns, and found again after a restart."""

import os
import tempfile

import mochi.margo
from mochi.warabi.client import Client, RegionID
from mochi.warabi.server import Provider

with tempfile.TemporaryDirectory() as directory:
    path = os.path.join(directory, "target")
    config = {"target": {"type": "file", "config": {"path": path, "create_if_missing": True}}}

    with mochi.margo.Engine("na+sm", mochi.margo.server) as engine:
        provider = Provider(engine, 0, config)
        target = Client(engine).make_target_handle(str(engine.addr()), 0)

        # At once: the write returns when its bytes are on stable storage.
        at_once = target.create(100)
        target.write(at_once, 0, b"durable at once", persist=True)

        # Many writes, one wait.
        batch = target.create(100)
        for number in range(10):
            target.write(batch, 10 * number, f"record {number:03}".encode())
        target.persist(batch, 0, 100)

        # Without waiting: the request tells when it is done.
        later = target.create_and_write(b"durable later")
        request = target.persist_async(later, 0, target.size(later))
        request.wait()

        kept = [region.to_bytes() for region in (at_once, batch, later)]

    # Another engine, as after a restart, finds the same regions.
    with mochi.margo.Engine("na+sm", mochi.margo.server) as engine:
        provider = Provider(engine, 0, config)
        target = Client(engine).make_target_handle(str(engine.addr()), 0)
        for data in kept:
            print(target.read(RegionID(data), 0, 10))
