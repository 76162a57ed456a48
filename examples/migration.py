"""Moving a target to another provider: the same regions, in another place and another backend."""

import os
import tempfile

import mochi.margo
from mochi.warabi.client import Client
from mochi.warabi.server import Exception, Provider

with (
    tempfile.TemporaryDirectory() as directory,
    mochi.margo.Engine("na+sm", mochi.margo.server) as engine,
):
    address = str(engine.addr())
    source = Provider(engine, 1, {"target": {"type": "memory"}})
    destination = Provider(engine, 2, {})  # no target yet; it could be in any other process

    before = Client(engine).make_target_handle(address, 1)
    region = before.create_and_write(b"some bytes" * 100_000)
    before.link_name(region, "/results")

    options = {
        "new_root": os.path.join(directory, "archive"),  # a path at the destination
        "merge_config": {"target": {"type": "file"}},  # what it was: memory
        "transfer_size": 256 * 1024,
    }
    source.migrate_target(
        address, 2, options, progress=lambda done, total: print(f"{done} of {total} bytes")
    )

    # The region is the same, by its ID and by its name.
    after = Client(engine).make_target_handle(address, 2)
    print(after.read(region, 0, 10), after.open_name("/results") == region)
    print(destination.get_config()["target"]["type"])
    try:
        before.read(region, 0, 10)
    except Exception as error:
        print(error)

    # A copy: the source's files stay, and could be served again.
    backup = Provider(engine, 3, {})
    destination.migrate_target(
        address, 3, {"new_root": os.path.join(directory, "backup"), "remove_source": False}
    )
    print(sorted(name for name in os.listdir(directory) if "." not in name))
