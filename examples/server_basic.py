"""A server: an engine with two providers, reached by a client in another process.

The client is this script again, started with the server's address as its argument.
"""

import subprocess
import sys

import mochi.margo
from mochi.warabi.client import Client
from mochi.warabi.server import Provider


def serve() -> None:
    # With "tcp" instead of "na+sm", clients on other hosts could be let in, too.
    with mochi.margo.Engine("na+sm", mochi.margo.server) as engine:
        first = Provider(engine, 1, {"target": {"type": "memory"}})
        limited = {"type": "memory", "config": {"capacity": 1 << 20}}
        second = Provider(engine, 2, {"target": limited})
        print("listening:", engine.listening)
        for provider in (first, second):
            print(f"provider {provider.provider_id}:", provider.get_config()["target"])

        # A server that has nothing else to do calls engine.wait_for_finalize() here; it returns
        # at SIGINT or SIGTERM.  This one ends when its client has ended.
        subprocess.run([sys.executable, __file__, str(engine.addr())], check=True)

        first.close()
        print("providers up:", bool(first), bool(second))


def call(address: str) -> None:
    with mochi.margo.Engine("na+sm", mochi.margo.client) as engine:
        client = Client(engine)
        for provider_id in (1, 2):
            target = client.make_target_handle(address, provider_id)
            region = target.create_and_write(b"from another process")
            print(f"client, provider {provider_id}:", target.read(region, 0, 4), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        call(sys.argv[1])
    else:
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # is a text file
        serve()
