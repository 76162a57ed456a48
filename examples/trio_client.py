"""The client for Trio programs: the same methods, every one of them awaited."""

import trio

import mochi.margo
import warabi.aio
from mochi.warabi.server import Provider


async def store(target: warabi.aio.Target, number: int, sizes: dict[int, int]) -> None:
    region = await target.create_and_write(bytes(number * 1000))
    sizes[number] = await target.size(region)


async def main(address: str) -> None:
    async with warabi.aio.connect(address, 3) as target:
        region = await target.create(16)
        await target.write(region, 0, b"structured", persist=True)
        print(await target.read(region, 0, 10))

        # Tasks share a connection; their requests overlap.
        sizes: dict[int, int] = {}
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(store, target, number, sizes)
        print("stored:", sorted(sizes.items()))

        # Every wait can be cancelled, and the connection is usable afterwards.
        with trio.move_on_after(0) as scope:
            await target.read(region, 0, 16)
        print("cancelled:", scope.cancelled_caught)
        print("regions:", len([region async for region in target.list()]))


with mochi.margo.Engine("na+sm", mochi.margo.server) as engine:
    provider = Provider(engine, 3, {"target": {"type": "memory"}})
    trio.run(main, str(engine.addr()))
