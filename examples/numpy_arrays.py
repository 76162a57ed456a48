"""NumPy arrays: as plain bytes, or with their type and shape."""

import io

import numpy as np

import mochi.margo
from mochi.warabi.client import Client
from mochi.warabi.server import Provider

with mochi.margo.Engine("na+sm", mochi.margo.server) as engine:
    provider = Provider(engine, 0, {"target": {"type": "memory"}})
    target = Client(engine).make_target_handle(str(engine.addr()), 0)

    # An array is a buffer: its bytes are stored; readers must know dtype and shape.
    field = np.linspace(0.0, 1.0, 12).reshape(3, 4)
    region = target.create_and_write(field)
    copy = np.empty((3, 4))
    target.read_into(region, 0, copy)
    row = np.empty(4)
    target.read_into(region, 1 * row.nbytes, row)
    print("equal:", np.array_equal(copy, field), np.array_equal(row, field[1]))

    # put_array stores what the bytes mean, too; any layout will do.
    arrays = {
        "table": np.array([(1, 0.5), (2, 0.25)], dtype=[("id", "i4"), ("weight", "f8")]),
        "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "every other": np.arange(10)[::2],
        "dates": np.array(["2024-02-29", "2025-01-01"], dtype="M8[D]"),
    }
    for name, stored in arrays.items():
        found = target.get_array(target.put_array(stored, persist=True))
        print(f"{name}: {found.dtype}, {found.shape}, equal: {np.array_equal(found, stored)}")

    # Such a region is what numpy.save would have written.
    region = target.put_array(field)
    loaded = np.load(io.BytesIO(target.read(region, 0, target.size(region))))
    print("numpy.load:", loaded.shape)
