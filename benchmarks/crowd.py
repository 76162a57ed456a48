"""A client that reads 4 KiB in a loop, one of many: ``python -m benchmarks.crowd ADDRESS SECONDS``.

Says that it is ready, waits for a line on its standard input, then reads 4 KiB again and again.
Prints how many times.
"""

from __future__ import annotations

import sys
import time

from warabi.client import Client
from warabi.engine import Engine, client


def main() -> None:
    address, seconds = sys.argv[1], float(sys.argv[2])
    transport = "na+sm" if address.startswith("na+sm") else "tcp"
    with Engine(transport, client) as engine:
        target = Client(engine).make_target_handle(address, 1)
        region = target.create_and_write(b"c" * 4096)
        place = bytearray(4096)
        for _ in range(3):
            target.read_into(region, 0, place)
        print("ready", flush=True)
        sys.stdin.readline()
        count, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            target.read_into(region, 0, place)
            count += 1
        print(count, flush=True)


if __name__ == "__main__":
    main()
