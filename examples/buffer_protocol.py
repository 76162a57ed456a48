"""Whatever has a buffer can be stored and filled, without copies on the way."""

import array
import mmap
import tempfile

import mochi.margo
from mochi.warabi.client import Client, Exception
from mochi.warabi.server import Provider

with mochi.margo.Engine("na+sm", mochi.margo.server) as engine:
    provider = Provider(engine, 0, {"target": {"type": "memory"}})
    target = Client(engine).make_target_handle(str(engine.addr()), 0)
    region = target.create(1024)

    # Sources: bytes, bytearray, slices of them, arrays, mapped files.
    target.write(region, 0, b"bytes, ")
    target.write(region, 7, bytearray(b"a bytearray, "))
    target.write(region, 20, memoryview(b"some of a memoryview")[8:])
    print(target.read(region, 0, 32))

    numbers = array.array("d", [1.5, 2.5, 3.5])
    target.write(region, 100, numbers)

    # Destinations: anything writable.  Reading into the same buffer again needs no new memory.
    back = array.array("d", [0.0, 0.0, 0.0])
    target.read_into(region, 100, back)
    print(back.tolist())

    buffer = bytearray(32)
    target.read_into(region, 0, memoryview(buffer)[4:11])
    print(bytes(buffer[:12]))

    with tempfile.TemporaryFile() as file:
        file.truncate(4096)
        with mmap.mmap(file.fileno(), 4096) as mapped:
            target.read_into(region, 0, memoryview(mapped)[:1024])
            print(mapped[7:20])

    # What cannot be a destination is refused before anything is written.
    wrong: dict[str, bytes | memoryview] = {
        "read-only": b"12345",
        "strided": memoryview(buffer)[::2],
    }
    for name, destination in wrong.items():
        try:
            target.read_into(region, 0, destination)
        except Exception as error:
            print(f"{name}: {type(error).__name__}")
