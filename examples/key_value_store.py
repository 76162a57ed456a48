"""A higher-level API: a small key-value store, whose values are regions.

Keys are names in the target's tree, so nothing else has to be kept: a store that is opened again
finds them there, and a mount shows every value as a file.
"""

import errno
import os
import tempfile
from collections.abc import Iterator, MutableMapping
from urllib.parse import quote, unquote

import mochi.margo
from mochi.warabi.client import Client, TargetHandle
from mochi.warabi.server import Provider
from warabi.errors import PathError


class Store(MutableMapping[str, bytes]):
    """A durable dict of text to bytes.

    For one writer of a key at a time; a key that is set again is missing for a moment.
    """

    def __init__(self, target: TargetHandle) -> None:
        self._target = target

    @staticmethod
    def _path(key: str) -> str:
        return "/key-" + quote(key, safe="")  # a key may have slashes, or be "."

    def __getitem__(self, key: str) -> bytes:
        try:
            region = self._target.open_name(self._path(key))
        except PathError as error:
            if error.errno != errno.ENOENT:
                raise
            raise KeyError(key) from None
        return self._target.read(region, 0, self._target.size(region))

    def __setitem__(self, key: str, value: bytes) -> None:
        new = self._target.create_and_write(value, persist=True)
        self.pop(key, None)
        self._target.link_name(new, self._path(key))
        self._target.persist(new, 0, 0)  # its name, too

    def __delitem__(self, key: str) -> None:
        self[key]
        self._target.unlink_name(self._path(key))

    def __iter__(self) -> Iterator[str]:
        for name in self._target.list_names("/"):
            if name.startswith("key-"):
                yield unquote(name.removeprefix("key-"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


with tempfile.TemporaryDirectory() as directory:
    path = os.path.join(directory, "store")
    config = {"target": {"type": "file", "config": {"path": path, "create_if_missing": True}}}
    for run in ("first", "second"):
        with mochi.margo.Engine("na+sm", mochi.margo.server) as engine:
            provider = Provider(engine, 0, config)
            store = Store(Client(engine).make_target_handle(str(engine.addr()), 0))
            print(f"{run} run:", dict(store))
            store["colour"] = b"green"
            store["path/with slashes"] = bytes(3)
            store["last run"] = run.encode()
            if run == "second":
                del store["colour"]
                print("now:", sorted(store), "colour" in store, store["last run"])
