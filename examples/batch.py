"""Many regions: what batching saves, and how to find one's way in them."""

import time

import mochi.margo
from mochi.warabi.client import Client
from mochi.warabi.server import Provider

COUNT = 500

with (
    mochi.margo.Engine("na+sm", mochi.margo.server) as engine,
    mochi.margo.Engine("na+sm", mochi.margo.client) as client_engine,
):
    provider = Provider(engine, 0, {"target": {"type": "memory"}})
    target = Client(client_engine).make_target_handle(str(engine.addr()), 0)
    records = [f"record {number:06}".encode() for number in range(COUNT)]

    start = time.perf_counter()
    one_by_one = [target.create_and_write(record) for record in records]
    middle = time.perf_counter()
    requests = [target.create_and_write_async(record) for record in records]
    together = [request.wait() for request in requests]
    end = time.perf_counter()
    print(f"{COUNT} regions, one by one: {middle - start:.3f} s, together: {end - middle:.3f} s")

    # Small records that belong together are better off as extents of one region.
    size = len(records[0])
    packed = target.create(size * COUNT)
    target.write(packed, 0, b"".join(records))
    picked = bytearray(2 * size)
    target.read_vector(packed, [(3 * size, size), (400 * size, size)], picked)
    print("two of one region:", bytes(picked[:size]), bytes(picked[size:]))

    for request in [target.erase_async(region) for region in one_by_one]:
        request.wait()
    left = list(target.list(page_size=100))
    print("left:", len(left), set(left) == {*together, packed})
