"""Names: regions in a tree of directories, as a mount shows them."""

import mochi.margo
from mochi.warabi.client import Client, Exception
from mochi.warabi.server import Provider

with mochi.margo.Engine("na+sm", mochi.margo.server) as engine:
    provider = Provider(engine, 0, {"target": {"type": "memory"}})
    target = Client(engine).make_target_handle(str(engine.addr()), 0)

    region = target.create_and_write(b"once stored, found by name")
    nameless = target.create_and_write(b"found by its ID only")
    target.link_name(region, "/report")
    target.link_name(region, "/same report")
    print("names of the region:", sorted(target.stat(region).names))

    # The root also shows regions without a name, under their IDs.
    shown = list(target.list_names("/"))
    print("listed:", [name for name in shown if name != nameless.hex()], nameless.hex() in shown)

    found = target.open_name("/report")
    print("opened:", found == region, target.read(found, 0, 11))

    # The last name takes the region with it.
    target.unlink_name("/report")
    print("still there:", target.size(region))
    target.unlink_name("/same report")
    try:
        target.size(region)
    except Exception as error:
        print("gone:", type(error).__name__)
