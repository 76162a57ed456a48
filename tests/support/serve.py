"""A provider process for the tests: ``serve.py TRANSPORT PROVIDERS [ENGINE-CONFIG]``.

PROVIDERS is a JSON object, provider ID to configuration.  Prints its address, serves until
SIGTERM, a remote shutdown, or the end of its standard input.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

from warabi.engine import Engine, server
from warabi.server import Provider


def main() -> None:
    engine = Engine(sys.argv[1], server, config=sys.argv[3] if len(sys.argv) > 3 else "")
    providers = [
        Provider(engine, int(provider_id), config)
        for provider_id, config in json.loads(sys.argv[2]).items()
    ]
    engine.enable_remote_shutdown()

    def finalize_at_end_of_input() -> None:
        while os.read(0, 4096):  # unbuffered: a lock on sys.stdin would trouble the exit
            pass
        engine.finalize()

    before = signal.getsignal(signal.SIGINT)

    def announce() -> None:
        """Once a signal ends the process in order: who reads the address may send one."""
        while signal.getsignal(signal.SIGINT) is before:
            time.sleep(0.001)
        print(engine.addr(), flush=True)

    threading.Thread(target=finalize_at_end_of_input, daemon=True).start()
    threading.Thread(target=announce, daemon=True).start()
    engine.wait_for_finalize()
    del providers


if __name__ == "__main__":
    main()
