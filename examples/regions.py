"""Regions and their IDs: kept elsewhere, compared, listed, resized."""

import pickle

import mochi.margo
from mochi.warabi.client import Client, RegionID
from mochi.warabi.server import Provider

with mochi.margo.Engine("na+sm", mochi.margo.server) as engine:
    provider = Provider(engine, 0, {"target": {"type": "memory"}})
    target = Client(engine).make_target_handle(str(engine.addr()), 0)

    region = target.create_and_write(b"findable")

    # An ID is 16 bytes, to be kept in a database, a file name, a message.
    kept = region.to_bytes()
    print("the same again:", RegionID(kept) == region, pickle.loads(pickle.dumps(region)) == region)
    print("found:", target.read(RegionID(kept), 0, 8))

    # IDs are hashable and have an order.
    labels = {target.create(size): f"{size} bytes" for size in (0, 1, 1000)}
    for found in sorted(labels):
        print(labels[found], "->", target.size(found))

    # A region grows and shrinks under the same ID; new bytes are zero.
    target.resize(region, 12)
    print("grown:", target.read(region, 0, 12))
    target.resize(region, 4)
    print("shrunk:", target.read(region, 0, target.size(region)))

    # Several extents of a region in one request.
    target.write_vector(region, [(0, 1), (3, 1)], b"FD")
    print("two extents:", target.read(region, 0, 4))

    print("regions:", len(list(target.list())))
