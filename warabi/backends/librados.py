"""librados, the C library of Ceph's object store, by ctypes.

Not by the ``rados`` module of distributions: that is compiled for their own version of Python, is
in no package registry, reads into new objects only, and lacks the calls that fence an owner off.

Every function may block, for at most the timeouts of the connection, and releases the interpreter
lock meanwhile.  Errors are ``OSError``; a missing object is ``FileNotFoundError``.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from typing import Any

from warabi.errors import ConfigError
from warabi.shm.memory import address

_FULL_TRY = 64  # LIBRADOS_OPERATION_FULL_TRY: an error instead of waiting until there is space
_EQUAL = 1  # LIBRADOS_CMPXATTR_OP_EQ
_WINDOW = 64
"""Operations under way at a time: enough to use every OSD of a small cluster."""

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "rados_create2": (POINTER(c_void_p), c_char_p, c_char_p, c_uint64),
    "rados_conf_read_file": (c_void_p, c_char_p),
    "rados_conf_set": (c_void_p, c_char_p, c_char_p),
    "rados_conf_get": (c_void_p, c_char_p, c_char_p, c_size_t),
    "rados_connect": (c_void_p,),
    "rados_shutdown": (c_void_p,),
    "rados_getaddrs": (c_void_p, POINTER(c_void_p)),
    "rados_buffer_free": (c_void_p,),
    "rados_blocklist_add": (c_void_p, c_char_p, c_uint32),
    "rados_wait_for_latest_osdmap": (c_void_p,),
    "rados_mon_command": (
        c_void_p, POINTER(c_char_p), c_size_t, c_char_p, c_size_t,
        POINTER(c_void_p), POINTER(c_size_t), POINTER(c_void_p), POINTER(c_size_t),
    ),
    "rados_ioctx_create": (c_void_p, c_char_p, POINTER(c_void_p)),
    "rados_ioctx_destroy": (c_void_p,),
    "rados_ioctx_set_namespace": (c_void_p, c_char_p),
    "rados_read": (c_void_p, c_char_p, c_void_p, c_size_t, c_uint64),
    "rados_stat": (c_void_p, c_char_p, POINTER(c_uint64), c_void_p),
    "rados_getxattr": (c_void_p, c_char_p, c_char_p, c_char_p, c_size_t),
    "rados_aio_create_completion2": (c_void_p, c_void_p, POINTER(c_void_p)),
    "rados_aio_wait_for_complete": (c_void_p,),
    "rados_aio_get_return_value": (c_void_p,),
    "rados_aio_release": (c_void_p,),
    "rados_aio_read": (c_void_p, c_char_p, c_void_p, c_void_p, c_size_t, c_uint64),
    "rados_aio_stat": (c_void_p, c_char_p, c_void_p, POINTER(c_uint64), c_void_p),
    "rados_aio_write_op_operate": (c_void_p, c_void_p, c_void_p, c_char_p, c_void_p, c_int),
    "rados_write_op_operate2": (c_void_p, c_void_p, c_char_p, c_void_p, c_int),
    "rados_create_write_op": (),
    "rados_release_write_op": (c_void_p,),
    "rados_write_op_create": (c_void_p, c_int, c_char_p),
    "rados_write_op_write": (c_void_p, c_void_p, c_size_t, c_uint64),
    "rados_write_op_truncate": (c_void_p, c_uint64),
    "rados_write_op_zero": (c_void_p, c_uint64, c_uint64),
    "rados_write_op_remove": (c_void_p,),
    "rados_write_op_cmpxattr": (c_void_p, c_char_p, c_uint8, c_char_p, c_size_t),
    "rados_write_op_setxattr": (c_void_p, c_char_p, c_char_p, c_size_t),
    "rados_nobjects_list_open": (c_void_p, POINTER(c_void_p)),
    "rados_nobjects_list_next": (c_void_p, POINTER(c_char_p), c_void_p, c_void_p),
    "rados_nobjects_list_close": (c_void_p,),
}  # fmt: skip
_VOID = ("rados_shutdown", "rados_buffer_free", "rados_ioctx_destroy", "rados_ioctx_set_namespace",
         "rados_aio_release", "rados_release_write_op", "rados_nobjects_list_close")  # fmt: skip


@functools.cache
def _library() -> Any:
    try:
        library = ctypes.CDLL("librados.so.2")
    except OSError:
        raise ConfigError(
            "the backend rados needs librados.so.2, which is not installed; Debian's package is"
            " librados2"
        ) from None
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = arguments
        if name in _VOID or (name.startswith("rados_write_op_") and "operate" not in name):
            function.restype = None
    library.rados_create_write_op.restype = c_void_p
    return library


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


class Cluster:
    """A connection to a cluster, with an address of its own by which it can be blocklisted.

    Args:
        conf: the configuration file; None for the usual places.
        user: as in ``client.USER``.
        keyring: the file with the user's key; None for the one in the configuration.
        connect: seconds after which connecting fails.
        patience: seconds after which a call fails, where the configuration has no limit.
    """

    def __init__(
        self, conf: str | None, user: str, keyring: str | None, connect: float, patience: float
    ) -> None:
        self._library = library = _library()
        self.handle = c_void_p()
        name = f"client.{user}".encode()
        _checked(library.rados_create2(ctypes.byref(self.handle), b"ceph", name, 0))
        try:
            self._configure(conf, keyring, connect, patience)
            _checked(library.rados_connect(self.handle))
        except BaseException:
            self.close()
            raise

    def _configure(
        self, conf: str | None, keyring: str | None, connect: float, patience: float
    ) -> None:
        library = self._library
        _checked(library.rados_conf_read_file(self.handle, conf and os.fsencode(conf)))
        self._set("client_mount_timeout", f"{connect:g}")
        for option in ("rados_mon_op_timeout", "rados_osd_op_timeout"):
            value = ctypes.create_string_buffer(64)
            _checked(library.rados_conf_get(self.handle, option.encode(), value, len(value)))
            if not float(value.value or b"0"):
                self._set(option, f"{patience:g}")
        self._set("log_to_stderr", "false")
        self._set("err_to_stderr", "false")
        if keyring is not None:
            self._set("keyring", keyring)

    def _set(self, option: str, value: str) -> None:
        _checked(self._library.rados_conf_set(self.handle, option.encode(), value.encode()))

    def address(self) -> str:
        """This client's address, as :meth:`blocklist` takes it."""
        found = c_void_p()
        _checked(self._library.rados_getaddrs(self.handle, ctypes.byref(found)))
        try:
            return ctypes.string_at(found.value or 0).decode()
        finally:
            self._library.rados_buffer_free(found)

    def blocklist(self, client: str, seconds: int) -> None:
        """Have every OSD refuse the client at an address; calls that come after this one returned
        reach OSDs that do."""
        _checked(self._library.rados_blocklist_add(self.handle, client.encode(), seconds))
        _checked(self._library.rados_wait_for_latest_osdmap(self.handle))

    def command(self, prefix: str) -> Any:
        """The monitors' answer to a command."""
        request = json.dumps({"prefix": prefix, "format": "json"}).encode()
        out, size = c_void_p(), c_size_t()
        status = self._library.rados_mon_command(
            self.handle, (c_char_p * 1)(request), 1, b"", 0,
            ctypes.byref(out), ctypes.byref(size), None, None,
        )  # fmt: skip
        try:
            _checked(status)
            return json.loads(ctypes.string_at(out.value or 0, size.value))
        finally:
            if out:
                self._library.rados_buffer_free(out)

    def close(self) -> None:
        self._library.rados_shutdown(self.handle)


class Change:
    """Changes of one object, to be made by :meth:`Pool.apply` all at once or not at all."""

    def __init__(self) -> None:
        self._library = _library()
        self.handle = c_void_p(self._library.rados_create_write_op())

    def __del__(self) -> None:
        self._library.rados_release_write_op(self.handle)

    def create(self, *, exclusive: bool = False) -> Change:
        """Create the object; *exclusive*: fail with EEXIST if it exists."""
        self._library.rados_write_op_create(self.handle, exclusive, None)
        return self

    def write(self, offset: int, data: memoryview) -> Change:
        """Write *data*, which are copied."""
        if data:
            self._library.rados_write_op_write(self.handle, address(data), len(data), offset)
        return self

    def truncate(self, size: int) -> Change:
        """Make an object that exists end there."""
        self._library.rados_write_op_truncate(self.handle, size)
        return self

    def zero(self, offset: int, size: int) -> Change:
        """Zero a range of an object that exists, which does not grow."""
        self._library.rados_write_op_zero(self.handle, offset, size)
        return self

    def remove(self) -> Change:
        self._library.rados_write_op_remove(self.handle)
        return self

    def expect(self, name: str, value: bytes) -> Change:
        """Fail with ECANCELED unless the object has this extended attribute."""
        self._library.rados_write_op_cmpxattr(self.handle, name.encode(), _EQUAL, value, len(value))
        return self

    def attribute(self, name: str, value: bytes) -> Change:
        """Set an extended attribute."""
        self._library.rados_write_op_setxattr(self.handle, name.encode(), value, len(value))
        return self


class Pool:
    """Objects of one namespace of a pool.  Thread-safe."""

    def __init__(self, cluster: Cluster, name: str, namespace: str) -> None:
        self._library = _library()
        self._handle = c_void_p()
        _checked(
            self._library.rados_ioctx_create(
                cluster.handle, name.encode(), ctypes.byref(self._handle)
            )
        )
        self._library.rados_ioctx_set_namespace(self._handle, namespace.encode())

    def close(self) -> None:
        self._library.rados_ioctx_destroy(self._handle)

    def read(self, name: str, offset: int, out: memoryview) -> int:
        """Read into *out*; returns how many bytes there are."""
        return _checked(
            self._library.rados_read(self._handle, name.encode(), address(out), len(out), offset)
        )

    def size(self, name: str) -> int:
        """Bytes of an object."""
        found = c_uint64()
        _checked(self._library.rados_stat(self._handle, name.encode(), ctypes.byref(found), None))
        return found.value

    def attribute(self, name: str, key: str) -> bytes | None:
        """An extended attribute of an object; None if it has none of that name."""
        value = ctypes.create_string_buffer(4096)
        try:
            size = _checked(
                self._library.rados_getxattr(
                    self._handle, name.encode(), key.encode(), value, len(value)
                )
            )
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
            return None
        return value.raw[:size]

    def apply(self, name: str, change: Change) -> None:
        """Make a change, and return when every copy of the object has it on stable storage."""
        _checked(
            self._library.rados_write_op_operate2(
                change.handle, self._handle, name.encode(), None, _FULL_TRY
            )
        )

    def apply_all(self, changes: Sequence[tuple[str, Change]], *, missing: bool = False) -> None:
        """Make changes of several objects concurrently; raises the first error after all have
        ended.  *missing*: an object that does not exist is none."""
        if len(changes) == 1 and not missing:
            self.apply(*changes[0])
            return
        results = self._concurrently(
            lambda completion, name, change: self._library.rados_aio_write_op_operate(
                change.handle, self._handle, completion, name, None, _FULL_TRY
            ),
            ((name.encode(), change) for name, change in changes),
        )
        for result in results:
            if not (missing and result == -errno.ENOENT):
                _checked(result)

    def read_all(self, pieces: Sequence[tuple[str, int, memoryview]]) -> list[int | None]:
        """Read from several objects concurrently; returns how many bytes each had, None for an
        object that does not exist."""
        results = self._concurrently(
            lambda completion, name, offset, out: self._library.rados_aio_read(
                self._handle, name, completion, address(out), len(out), offset
            ),
            ((name.encode(), offset, out) for name, offset, out in pieces),
        )
        return [None if found == -errno.ENOENT else _checked(found) for found in results]

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """The sizes of several objects; None for one that does not exist."""
        found = (c_uint64 * len(names))()
        step, start = ctypes.sizeof(c_uint64), ctypes.addressof(found)
        results = self._concurrently(
            lambda completion, name, at: self._library.rados_aio_stat(
                self._handle, name, completion, ctypes.cast(at, POINTER(c_uint64)), None
            ),
            ((name.encode(), start + index * step) for index, name in enumerate(names)),
        )
        return [
            None if result == -errno.ENOENT else (_checked(result), found[index])[1]
            for index, result in enumerate(results)
        ]

    def _concurrently(self, begin: Any, calls: Iterable[tuple[Any, ...]]) -> list[int]:
        """Begin each call with a completion of its own, and return all their results."""
        library, results = self._library, []
        waiting: list[c_void_p] = []

        def wait() -> None:
            completion = waiting[0]
            library.rados_aio_wait_for_complete(completion)
            results.append(library.rados_aio_get_return_value(completion))
            library.rados_aio_release(completion)
            del waiting[0]

        try:
            for call in calls:
                completion = c_void_p()
                _checked(library.rados_aio_create_completion2(None, None, ctypes.byref(completion)))
                if (begun := begin(completion, *call)) < 0:
                    library.rados_aio_release(completion)
                    _checked(begun)
                waiting.append(completion)
                if len(waiting) >= _WINDOW:
                    wait()
            while waiting:
                wait()
        finally:
            for completion in waiting:  # after an exception: buffers are in use until then
                library.rados_aio_wait_for_complete(completion)
                library.rados_aio_release(completion)
        return results

    def names(self) -> Iterator[str]:
        """Yield the names of all objects of the namespace."""
        listing = c_void_p()
        _checked(self._library.rados_nobjects_list_open(self._handle, ctypes.byref(listing)))
        try:
            entry = c_char_p()
            while True:
                result = self._library.rados_nobjects_list_next(
                    listing, ctypes.byref(entry), None, None
                )
                if result == -errno.ENOENT:
                    return
                _checked(result)
                yield (entry.value or b"").decode(errors="surrogateescape")
        finally:
            self._library.rados_nobjects_list_close(listing)
