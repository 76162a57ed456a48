"""Every basic operation of a client, and the errors that mistakes raise."""

from collections.abc import Callable

import mochi.margo
from mochi.warabi.client import Client, Exception, RegionID
from mochi.warabi.server import Provider

with mochi.margo.Engine("na+sm", mochi.margo.server) as engine:
    provider = Provider(engine, 7, {"target": {"type": "memory"}})
    target = Client(engine).make_target_handle(address=str(engine.addr()), provider_id=7)

    region = target.create(size=100)
    target.write(region, offset=10, data=b"abcdef", persist=False)
    print("read:", target.read(region, offset=8, size=10))

    target.write(region, offset=12, data=b"XY")
    target.persist(region, offset=0, size=100)
    print("overwritten:", target.read(region, offset=10, size=6))

    both = target.create_and_write(b"created and written at once", persist=True)
    print("size:", target.size(both))

    target.erase(region)
    mistakes: dict[str, Callable[[], object]] = {
        "erased region": lambda: target.read(region, 0, 1),
        "foreign region": lambda: target.size(RegionID(bytes(range(16)))),
        "beyond the end": lambda: target.write(both, 20, b"too many bytes"),
        "negative size": lambda: target.create(-1),
    }
    for name, mistake in mistakes.items():
        try:
            mistake()
        except Exception as error:
            print(f"{name}: {type(error).__name__}")
