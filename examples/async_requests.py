"""Requests that overlap: start many, do something else, wait for them later."""

import time

import mochi.margo
from mochi.warabi.client import Client, Exception
from mochi.warabi.server import Provider

with (
    mochi.margo.Engine("na+sm", mochi.margo.server) as engine,
    mochi.margo.Engine("na+sm", mochi.margo.client) as client_engine,
):
    provider = Provider(engine, 0, {"target": {"type": "memory"}})
    # Through an engine of its own, so that requests really travel.
    target = Client(client_engine).make_target_handle(str(engine.addr()), 0)

    creations = [target.create_async(4096) for _ in range(8)]
    regions = [creation.wait() for creation in creations]

    writes = [
        target.write_async(region, 0, bytes([number]) * 4096)
        for number, region in enumerate(regions)
    ]
    for request in writes:
        request.wait()
    print("written:", sum(request.completed() for request in writes))

    # completed() turns true without a task that waits for it.
    buffers = [bytearray(4096) for _ in regions]
    reads = [
        target.read_async(region, 0, buffer)
        for region, buffer in zip(regions, buffers, strict=True)
    ]
    while not all(request.completed() for request in reads):
        time.sleep(0.001)
    print("read:", [buffer[0] for buffer in buffers])

    made = target.create_and_write_async(b"made and written")
    print("made:", target.read(made.wait(), 0, 4))

    # An error is raised by wait(), as often as it is called.
    request = target.write_async(regions[0], 4000, bytes(200))
    for _ in range(2):
        try:
            request.wait()
        except Exception as error:
            print("too many bytes:", type(error).__name__)
