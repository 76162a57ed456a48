"""fsspec's file system of a target: the files of a mount, for pandas, xarray, dask, without one.

    fsspec.open("warabi://host:port/provider/path")       an engine on TCP
    fsspec.open("warabi://na+sm:pid-n/provider/path")     one on this host, na+sm://pid-n
    fsspec.open("warabi:///file/of/a/target/path")        a target that this process opens itself
    fsspec.filesystem("warabi", address=str(engine.addr()), provider_id=1)

A file that is written gets its name when it is closed, or when its transaction ends, in one step:
readers find the old file or the new one.  Regions without names are not shown.  Every call blocks;
the coroutines that fsspec expects run them in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import errno
import functools
import io
import os
import re
import stat
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from fsspec.asyn import AbstractAsyncStreamedFile, AsyncFileSystem, sync
from fsspec.callbacks import DEFAULT_CALLBACK
from fsspec.core import has_magic
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from fsspec.utils import isfilelike, stringify_path

from warabi import errors, processes
from warabi._core import extras, forks
from warabi._core.attributes import FETCHED, Attributes
from warabi.client import Client, RegionID, TargetHandle
from warabi.engine import Engine, client, server, state_of
from warabi.protocol import paths

if TYPE_CHECKING:
    from warabi.server import Provider  # needs the extra `server`

_CHUNK = 4 << 20
"""Bytes that are copied from and to local files at once."""
_PIECE = 1 << 20  # of an append, whose request is limited
_ATTEMPTS = 10
"""How often a file is looked for that is replaced whenever it was found."""
_URL = re.compile(r"warabi://(na\+sm:\d+-\d+|[^/]+)/(\d+)(/.*)?", re.DOTALL)
_EMBEDDED = ("warabi+file://", "warabi:///")  # xarray takes no scheme with a "+" for a URL

_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T")


@contextlib.contextmanager
def _python_errors() -> Iterator[None]:
    """Errors of this library become those that programs written for files expect."""
    try:
        yield
    except errors.PathError:
        raise  # is one already
    except errors.PermissionDenied as error:
        raise PermissionError(errno.EACCES, str(error)) from error
    except errors.StorageFull as error:
        raise OSError(errno.ENOSPC, str(error)) from error
    except errors.TimedOut as error:
        raise TimeoutError(errno.ETIMEDOUT, str(error)) from error
    except (errors.ConnectionFailed, errors.ConnectionLost) as error:
        raise ConnectionError(str(error)) from error
    except (errors.ProviderNotFound, errors.TargetNotFound) as error:
        raise FileNotFoundError(errno.ENOENT, str(error)) from error
    except (errors.InvalidRegion, errors.StorageError, errors.CorruptTarget) as error:
        raise OSError(errno.EIO, str(error)) from error


def _blocking(function: _F) -> _F:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        with _python_errors():
            return function(*arguments, **options)

    return cast(_F, call)


def _in_thread(name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
    """The coroutine of the method *name*."""

    async def method(self: Any, *arguments: Any, **options: Any) -> Any:
        return await asyncio.to_thread(getattr(self, name), *arguments, **options)

    return method


def _embedded(url: str) -> tuple[str, str]:
    """The path of the target, a regular file, and the path in it."""
    path = os.path.normpath("/" + url.partition("://")[2].lstrip("/"))
    target = path
    while target != "/":
        if os.path.isfile(target):
            return target, path[len(target) :]
        target = os.path.dirname(target)
    raise FileNotFoundError(
        errno.ENOENT,
        f"{url}: no part of this path is a target; make one with"
        " filesystem('warabi+file', path=..., create=True)",
    )


def _parsed(url: str) -> tuple[str, int, str]:
    """The address, the provider's ID and the path in a URL."""
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError(
            f"{url}: expected warabi://host:port/provider/path, or"
            " warabi://na+sm:pid-n/provider/path on this host"
        )
    engine, provider_id, path = match.groups()
    if engine.startswith("na+sm:"):
        address = engine.replace(":", "://", 1)
    else:
        address = f"ofi+tcp://{engine}"
    return address, int(provider_id), path or ""


_serving_lock = forks.lock()
_serving: weakref.WeakValueDictionary[str, Provider] = weakref.WeakValueDictionary()
"""Providers of targets that this process has opened, by path."""


def _serve(path: str, create: bool) -> Provider:
    """Return the provider of the target at *path*, which is opened unless it is open here."""
    real = os.path.realpath(path)
    with _serving_lock:
        provider = _serving.get(real)
        if provider is None or state_of(provider.engine).finalized.is_set():
            make = extras.load("warabi.server", "server").Provider
            engine = Engine("na+sm", server)
            settings = {"path": real, "create_if_missing": create}
            try:
                provider = make(engine, 0, {"target": {"type": "file", "config": settings}})
            except BaseException:
                engine.finalize()
                raise
            _serving[real] = provider
        return provider


class WarabiFileSystem(AsyncFileSystem):  # type: ignore[misc]
    """The files of one target.

    Args:
        address: of the provider's engine, as ``str(engine.addr())`` returns it.
        provider_id: 0 to 65535.
        path: instead of an address, of a target in files that this process opens, and no other
            may have open; other processes reach it by pickles of this object.
        create: whether to make a target at *path* if there is none.
        config: of the engine that connects: ``timeout``, ``tls``, ``token_file``...
        read_only: refuse every change.
        auto_mkdir: whether directories that are missing are made for new files.

    Raises:
        ConnectionError, TimeoutError: no engine responds there.
        FileNotFoundError: it has no such provider; or no target at *path*.
        PermissionError: it refuses this client.
        ConfigError: a malformed address or configuration.
    """

    protocol: ClassVar[tuple[str, ...]] = ("warabi", "warabi+file")
    root_marker = "/"

    def __init__(
        self,
        address: str = "",
        provider_id: int = 0,
        path: str = "",
        create: bool = False,
        config: dict[str, Any] | None = None,
        read_only: bool = False,
        auto_mkdir: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if bool(address) == bool(path):
            raise errors.ConfigError("WarabiFileSystem: expected either an address or a path")
        self.auto_mkdir = auto_mkdir
        self._read_only = read_only
        self._path = path and os.path.abspath(path)
        with _python_errors():
            if path:
                self._provider = _serve(path, create)  # which serves as long as it is referred to
                self._engine = self._provider.engine
                address = str(self._engine.addr())
            else:
                settings = processes.portable(address, config or {})
                if isinstance(settings, str):  # a secret as text: an engine of its own
                    self._engine = Engine(address.partition(":")[0], client, config=config or {})
                else:
                    self._engine = processes.engine_for(settings, address)
            self._address, self._provider_id = address, provider_id
            self.target: TargetHandle = Client(self._engine).make_target_handle(
                address, provider_id, read_only
            )

    def close(self) -> None:
        """Close the target, if it was opened here."""
        if self._path:
            self._engine.finalize()
            self._cache.pop(self._fs_token, None)

    def __reduce__(self) -> Any:
        processes.settings_of(self._engine, "WarabiFileSystem")  # refuses secrets
        if not self._path:
            return super().__reduce__()
        place = self._address, self._provider_id, self._read_only, self.auto_mkdir
        return _elsewhere, place

    # Paths

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        path = stringify_path(path)
        if path.startswith(_EMBEDDED):
            path = _embedded(path)[1]
        elif path.startswith("warabi://"):
            path = _parsed(path)[2]
        return "/" + path.strip("/")

    @staticmethod
    def _get_kwargs_from_urls(url: str) -> dict[str, Any]:
        if url.startswith(_EMBEDDED):
            return {"path": _embedded(url)[0]}
        if url.startswith("warabi://"):
            address, provider_id, _ = _parsed(url)
            return {"address": address, "provider_id": provider_id}
        return {}

    def unstrip_protocol(self, name: str) -> str:
        name = self._strip_protocol(name)
        if self._path:
            return f"warabi://{self._path}{name}"
        scheme, _, rest = self._address.partition("://")
        engine = f"{scheme}:{rest}" if scheme == "na+sm" else rest
        return f"warabi://{engine}/{self._provider_id}{name}"

    @property
    def fsid(self) -> str:
        """The target's UUID."""
        return f"warabi_{self.target.getxattr('/', 'user.warabi.target').decode()}"

    # Looking

    def _entry(self, path: str, found: Attributes, link: bool = False) -> dict[str, Any]:
        kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "directory"}
        kind = kinds.get(stat.S_IFMT(found.mode), "other")
        return {
            "name": path,
            "size": found.size if kind == "file" else 0,
            "type": kind,
            "islink": link,
            "mode": found.mode,
            "uid": found.uid,
            "gid": found.gid,
            "nlink": found.nlink,
            "ino": found.ino,
            "mtime": found.mtime_ns / 1e9,
            "created": found.ctime_ns / 1e9,
        }

    @_blocking
    def info(self, path: str, **options: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        found = self.target.stat_name(path, follow_symlinks=False)
        link = stat.S_ISLNK(found.mode)
        return self._entry(path, self.target.stat_name(path) if link else found, link)

    @_blocking
    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        path = self._strip_protocol(path)
        try:
            entries = list(self.target.scandir(path))
        except errors.PathNotADirectory:
            found = self.info(path)
            return [found] if detail else [path]
        above = path.rstrip("/")
        listed: list[Any] = []
        for name, attributes in entries:
            if not above and name == attributes.region.hex():
                continue  # has no name
            one = f"{above}/{name}"
            if not detail:
                listed.append(one)
            elif stat.S_ISLNK(attributes.mode):
                with contextlib.suppress(OSError):  # it leads nowhere, or was removed
                    listed.append(self.info(one))
            else:
                listed.append(self._entry(one, attributes))
        return listed

    def exists(self, path: str, **options: Any) -> bool:
        try:
            self.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def _is(self, path: str, kind: str) -> bool:
        try:
            return bool(self.info(path)["type"] == kind)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def isfile(self, path: str) -> bool:
        return self._is(path, "file")

    def isdir(self, path: str) -> bool:
        return self._is(path, "directory")

    def modified(self, path: str) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self.info(path)["mtime"], tz=datetime.UTC)

    def created(self, path: str) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self.info(path)["created"], tz=datetime.UTC)

    def region(self, path: str) -> tuple[RegionID, int]:
        """The region at *path*, and its size in bytes.

        Raises:
            FileNotFoundError, NotADirectoryError, IsADirectoryError: it is not a file.
        """
        path = self._strip_protocol(path)
        return self._region(path, self.target.stat_name(path))

    @staticmethod
    def _region(path: str, found: Attributes) -> tuple[RegionID, int]:
        if not stat.S_ISREG(found.mode):
            number = errno.EISDIR if stat.S_ISDIR(found.mode) else errno.EINVAL
            raise errors.path_error(number, f"{path}: {os.strerror(number)}")
        return found.region, found.size

    # Reading

    def _found(self, path: str, use: Callable[[Attributes, bytes | None], _T], limit: int) -> _T:
        """Return what *use* does with the attributes of what is at *path*, and with the bytes of a
        file of at most *limit* bytes; begins again if the file was replaced or truncated in
        between."""
        for attempt in range(_ATTEMPTS):
            found = self.target.fetch_name(path, limit)
            try:
                return use(*found)
            except (errors.InvalidRegion, errors.OutOfBounds):
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError

    def _pieces(
        self, path: str, slices: list[slice], found: Attributes, data: bytes | None
    ) -> list[bytes]:
        if data is not None:
            return [data[one] for one in slices]
        return self._ranges(slices, *self._region(path, found))

    def _read(self, path: str, slices: list[slice]) -> list[bytes]:
        path = self._strip_protocol(path)
        return self._found(path, functools.partial(self._pieces, path, slices), FETCHED)

    @_blocking
    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **options: Any
    ) -> bytes:
        return self._read(path, [slice(start, end)])[0]

    @_blocking
    def cat_ranges(
        self,
        paths: list[str],
        starts: Any,
        ends: Any,
        max_gap: int | None = None,
        on_error: str = "return",
        **options: Any,
    ) -> list[Any]:
        """As fsspec defines it; all ranges of one file are one request."""
        if not isinstance(paths, list):
            raise TypeError(f"cat_ranges: expected a list of paths, got {paths!r:.60}")
        count = len(paths)
        starts = starts if isinstance(starts, list | tuple) else [starts] * count
        ends = ends if isinstance(ends, list | tuple) else [ends] * count
        if not len(starts) == len(ends) == count:
            raise ValueError(f"cat_ranges: {count} paths, {len(starts)} starts, {len(ends)} ends")
        by_path: dict[str, list[int]] = {}
        for number, path in enumerate(paths):
            by_path.setdefault(path, []).append(number)
        found: list[Any] = [b""] * count
        for path, numbers in by_path.items():
            slices = [slice(starts[number], ends[number]) for number in numbers]
            try:
                with _python_errors():
                    pieces: list[Any] = self._read(path, slices)
            except Exception as error:
                if on_error != "return":
                    raise
                pieces = [error] * len(numbers)
            for number, piece in zip(numbers, pieces, strict=True):
                found[number] = piece
        return found

    def _ranges(self, slices: list[slice], region: RegionID, size: int) -> list[bytes]:
        extents = []
        for one in slices:
            first, last, _ = one.indices(size)
            extents.append((first, max(0, last - first)))
        if len(extents) == 1:
            return [self.target.read(region, *extents[0])]
        buffer = bytearray(sum(length for _, length in extents))
        self.target.read_vector(region, extents, buffer)
        view, pieces = memoryview(buffer), []
        for _, length in extents:
            pieces.append(bytes(view[:length]))
            view = view[length:]
        return pieces

    def cat(
        self, path: Any, recursive: bool = False, on_error: str = "raise", **options: Any
    ) -> Any:
        # Without a trip to fsspec's event loop for each file.
        if isinstance(path, str) and not (recursive or has_magic(path) or on_error != "raise"):
            return self.cat_file(path, **options)
        if options or not isinstance(path, list) or recursive or any(map(has_magic, path)):
            return sync(self.loop, self._cat, path, recursive, on_error, **options)
        return self._cat_files(path, on_error)

    def _cat_files(self, paths: list[Any], on_error: str) -> dict[str, Any]:
        """The contents of many files, with several requests under way at a time."""
        stripped = list(dict.fromkeys(self._strip_protocol(paths)))
        contents: dict[str, Any] = {}
        with contextlib.closing(self.target.fetch_names(stripped)) as results:
            for path, fetched in zip(stripped, results, strict=True):
                try:
                    with _python_errors():
                        if isinstance(fetched, Exception):
                            raise fetched
                        data = fetched[1]
                        contents[path] = self.cat_file(path) if data is None else data
                except Exception as error:
                    if on_error == "raise":
                        raise
                    if on_error == "return":
                        contents[path] = error
        return contents

    @_blocking
    def get_file(
        self, rpath: str, lpath: Any, callback: Any = DEFAULT_CALLBACK, **options: Any
    ) -> None:
        if not isfilelike(lpath):
            if self.isdir(rpath):
                os.makedirs(lpath, exist_ok=True)
                return
            region, size = self.region(rpath)
            with open(lpath, "wb") as file:
                self._get_region(region, size, file, callback)
        else:
            self._get_region(*self.region(rpath), lpath, callback)

    def _get_region(self, region: RegionID, size: int, file: Any, callback: Any) -> None:
        callback.set_size(size)
        buffer = memoryview(bytearray(min(size, _CHUNK)))
        for offset in range(0, size, _CHUNK):
            piece = buffer[: size - offset]
            self.target.read_into(region, offset, piece)
            file.write(piece)
            callback.relative_update(len(piece))

    # Writing

    def publish(self, region: RegionID, path: str, exclusive: bool) -> None:
        """Give *region* the name *path*; erases it if that fails."""
        try:
            self.with_parent(
                path, lambda: self.target.link_name(region, path, replace=not exclusive)
            )
        except BaseException:
            with contextlib.suppress(errors.Exception):
                self.target.erase(region)
            raise

    def with_parent(self, path: str, make: Callable[[], _T]) -> _T:
        """Return what *make* returns, which makes a file at *path*, after making the directories
        that are missing."""
        try:
            return make()
        except errors.PathNotFound:
            if not self.auto_mkdir:
                raise
            self.target.makedirs(self._parent(path), exist_ok=True)
            return make()

    def store(self, path: str, data: Any, exclusive: bool) -> None:
        """Make or replace the file at *path*, in one step."""
        self.with_parent(path, lambda: self.target.store_name(path, data, exclusive=exclusive))

    @staticmethod
    def store_arguments(path: str, exclusive: bool) -> tuple[Any, ...]:
        """The arguments of the operation ``store`` for a new file."""
        return path, 0o644, os.geteuid(), os.getegid(), exclusive, False

    @_blocking
    def pipe_file(self, path: str, value: Any, mode: str = "overwrite", **options: Any) -> None:
        if self._intrans:
            AbstractFileSystem.pipe_file(self, path, value, mode=mode, **options)
            return
        self.store(self._strip_protocol(path), value, mode == "create")

    @_blocking
    def pipe(self, path: Any, value: Any = None, **options: Any) -> None:
        files = {path: value} if isinstance(path, str) else path
        if self._intrans or len(files) == 1 or options.keys() - {"mode"}:
            for one, data in files.items():
                self.pipe_file(one, data, **options)
            return
        files = {self._strip_protocol(one): data for one, data in files.items()}
        exclusive = options.get("mode") == "create"
        stored = self.target.store_names(files.items(), exclusive=exclusive)
        with contextlib.closing(stored):
            for one, result in zip(files, stored, strict=True):
                if isinstance(result, errors.PathNotFound) and self.auto_mkdir:
                    self.pipe_file(one, files[one], **options)
                elif isinstance(result, Exception):
                    raise result

    @_blocking
    def put_file(
        self,
        lpath: Any,
        rpath: str,
        callback: Any = DEFAULT_CALLBACK,
        mode: str = "overwrite",
        **options: Any,
    ) -> None:
        if os.path.isdir(lpath):
            self.makedirs(rpath, exist_ok=True)
            return
        with open(lpath, "rb") as file, self.open(rpath, "xb" if mode == "create" else "wb") as to:
            callback.set_size(os.fstat(file.fileno()).st_size)
            while piece := file.read(_CHUNK):
                to.write(piece)
                callback.relative_update(len(piece))

    @_blocking
    def cp_file(self, path1: str, path2: str, **options: Any) -> None:
        """The target copies: no bytes pass through this process."""
        path1, path2 = self._strip_protocol(path1), self._strip_protocol(path2)
        if self.isdir(path1):
            self.target.makedirs(path2, exist_ok=True)
        else:
            copy = self._found(
                path1, lambda found, _: self.target.copy(self._region(path1, found)[0]), 0
            )
            self.publish(copy, path2, exclusive=False)

    @_blocking
    def mv(
        self,
        path1: Any,
        path2: Any,
        recursive: bool = True,
        maxdepth: int | None = None,
        **options: Any,
    ) -> None:
        """A single path is renamed, in one step, with all that is below it; into *path2* if that
        is a directory."""
        if not isinstance(path1, str) or not isinstance(path2, str) or has_magic(path1):
            AbstractFileSystem.mv(self, path1, path2, recursive=recursive, maxdepth=maxdepth)
            return
        source, into = self._strip_protocol(path1), self._strip_protocol(path2)
        if path2.endswith("/") or self.isdir(into):
            into = f"{into.rstrip('/')}/{source.rpartition('/')[2]}"
        self.target.stat_name(source, follow_symlinks=False)  # or its directory would be made
        self.with_parent(into, lambda: self.target.rename(source, into))

    @_blocking
    def rm_file(self, path: str) -> None:
        self.target.unlink_name(self._strip_protocol(path))

    @_blocking
    def rmdir(self, path: str) -> None:
        self.target.rmdir(self._strip_protocol(path))

    async def _rm(
        self, path: Any, recursive: bool = False, maxdepth: int | None = None, **options: Any
    ) -> None:
        """Remove files and directories; what a symbolic link leads to is never removed by it."""
        if recursive and maxdepth is None:
            for one in await self._expand_path(path):
                await asyncio.to_thread(self._rm_tree, one)
            return
        for one in reversed(await self._expand_path(path, recursive, maxdepth)):
            await asyncio.to_thread(self._rm_name, one)

    def _rm_name(self, path: str) -> None:
        try:
            self.rm_file(path)
        except IsADirectoryError:
            if path != "/":
                self.rmdir(path)

    @_blocking
    def _rm_tree(self, path: str) -> None:
        if not stat.S_ISDIR(self.target.stat_name(path, follow_symlinks=False).mode):
            self.rm_file(path)
            return
        nameless = {
            entry.name
            for entry in (self.target.scandir("/") if path == "/" else ())
            if entry.name == entry.attributes.region.hex()
        }
        for above, _, names in reversed(list(self.target.walk(path))):
            for name in names:
                if above != "/" or name not in nameless:
                    self.rm_file(f"{above}/{name}")
            self._rm_name(above)

    @_blocking
    def mkdir(self, path: str, create_parents: bool = True, **options: Any) -> None:
        path = self._strip_protocol(path)
        if create_parents:
            self.target.makedirs(path)
        else:
            self.target.mkdir(path)

    @_blocking
    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.target.makedirs(self._strip_protocol(path), exist_ok=exist_ok)

    @_blocking
    def touch(self, path: str, truncate: bool = True, **options: Any) -> None:
        path = self._strip_protocol(path)
        try:
            found = self.target.stat_name(path)
        except errors.PathNotFound:
            self.with_parent(path, lambda: self.target.create_name(path))
            return
        if truncate:
            self.target.resize(found.region, 0)
        now = time.time_ns()
        self.target.link.call("setattr", found.ino, None, None, None, now, now)

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | str | None = None,
        autocommit: bool = True,
        cache_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> WarabiFile | io.BufferedRandom:
        if mode == "xb" and self.exists(path):
            raise errors.path_error(errno.EEXIST, f"open {path}: File exists")
        with _python_errors():
            if mode == "r+b":
                return io.BufferedRandom(_Updated(self, path))
            return WarabiFile(
                self,
                path,
                mode,
                "default" if block_size is None else block_size,
                autocommit,
                cache_options=cache_options,
                **options,
            )

    async def open_async(self, path: str, mode: str = "rb", **options: Any) -> WarabiStream:
        """Open a file that coroutines read (``rb``) or write (``wb``, ``xb``, ``ab``)."""
        if mode not in ("rb", "wb", "xb", "ab") or options.get("compression"):
            raise ValueError(f"open_async: expected rb, wb, xb or ab, uncompressed, got {mode!r}")
        if mode == "rb":
            options.setdefault("cache_type", "none")
        path = self._strip_protocol(path)
        file = await asyncio.to_thread(self._open, path, mode, **options)
        assert isinstance(file, WarabiFile)
        return WarabiStream(file)

    _info = _in_thread("info")
    _ls = _in_thread("ls")
    _exists = _in_thread("exists")
    _isfile = _in_thread("isfile")
    _isdir = _in_thread("isdir")
    _cat_file = _in_thread("cat_file")
    _cat_ranges = _in_thread("cat_ranges")
    _get_file = _in_thread("get_file")
    _pipe_file = _in_thread("pipe_file")
    _put_file = _in_thread("put_file")
    _cp_file = _in_thread("cp_file")
    _mv_file = _in_thread("mv")
    _rm_file = _in_thread("rm_file")
    _rmdir = _in_thread("rmdir")
    _mkdir = _in_thread("mkdir")
    _makedirs = _in_thread("makedirs")
    _touch = _in_thread("touch")


def _elsewhere(
    address: str, provider_id: int, read_only: bool, auto_mkdir: bool
) -> WarabiFileSystem:
    return WarabiFileSystem(address, provider_id, read_only=read_only, auto_mkdir=auto_mkdir)


class WarabiFile(AbstractBufferedFile):  # type: ignore[misc]
    """A file that is read through fsspec's caches, or written in blocks.

    A new file of one block is stored by one call, and a larger one is a region without a name until
    it is committed; an append changes the region that is there, at each flush.
    """

    def __init__(self, fs: WarabiFileSystem, path: str, mode: str, *rest: Any, **more: Any) -> None:
        self._region: RegionID | None = None
        self._storing: paths.Storing | None = None
        self._appends = mode == "ab" and fs.exists(path)
        if mode == "rb" or self._appends:
            self._region, size = fs.region(path)
            if mode == "rb":
                more.setdefault("size", size)
        super().__init__(fs, path, mode, *rest, **more)
        if self._appends:
            self.loc = size

    def _run(self, steps: paths.Steps[_T]) -> _T:
        return paths.run(self.fs.target.link.call, steps)

    @_blocking
    def _fetch_range(self, start: int, end: int) -> bytes:
        assert self._region is not None
        data: bytes = self.fs.target.read(self._region, start, max(0, min(end, self.size) - start))
        return data

    def _begin(self) -> RegionID:
        storing = paths.Storing(self.fs.store_arguments(self.path, self.mode == "xb"), 0)
        region: RegionID = self.fs.with_parent(self.path, lambda: self._run(storing.begin()))
        self._region, self._storing = region, storing
        return region

    @_blocking
    def _upload_chunk(self, final: bool = False) -> bool:
        target: TargetHandle = self.fs.target
        with self.buffer.getbuffer() as data:
            if self._appends:
                assert self._region is not None
                for start in range(0, len(data), _PIECE):
                    target.append(self._region, data[start : start + _PIECE])
            elif self._region is None and final and self.autocommit:
                self.fs.store(self.path, data, self.mode == "xb")
                return True
            elif data:
                region = self._region or self._begin()
                target.resize(region, self.offset + len(data))
                target.write(region, self.offset, data)
        if final:
            self._region = self._region or self._begin()  # an empty one
            if self.autocommit:
                self.commit()
        return True

    @_blocking
    def commit(self) -> None:
        """Give the file its name."""
        if self._storing is not None and self._region is not None:
            try:
                self._run(self._storing.end(self._region))
            except BaseException:
                self.discard()
                raise
            self._region = self._storing = None

    @_blocking
    def discard(self) -> None:
        """Throw away what was written, but not what was appended."""
        if self._storing is not None and self._region is not None:
            with contextlib.suppress(errors.Exception):
                self._run(self._storing.give_up())
            self._region = self._storing = None


class _Updated(io.RawIOBase):
    """An existing file that is read and changed in place, without buffers."""

    def __init__(self, fs: WarabiFileSystem, path: str) -> None:
        super().__init__()
        self.name = path
        self._target = fs.target
        self._region, _ = fs.region(path)
        self._at = 0

    def readable(self) -> bool:
        return True

    writable = seekable = readable

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_CUR:
            offset += self._at
        elif whence == os.SEEK_END:
            offset += self._size()
        if offset < 0:
            raise OSError(errno.EINVAL, f"{self.name}: seek to {offset}")
        self._at = offset
        return offset

    def tell(self) -> int:
        return self._at

    @_blocking
    def _size(self) -> int:
        return self._target.size(self._region)

    @_blocking
    def readinto(self, buffer: Any) -> int:
        with memoryview(buffer).cast("B") as view:
            count = max(0, min(len(view), self._size() - self._at))
            self._target.read_into(self._region, self._at, view[:count])
        self._at += count
        return count

    @_blocking
    def write(self, data: Any) -> int:
        with memoryview(data).cast("B") as view:
            self._target.link.write(self._region, self._at, view, False, True)
            self._at += len(view)
            return len(view)

    @_blocking
    def truncate(self, size: int | None = None) -> int:
        size = self._at if size is None else size
        self._target.resize(self._region, size)
        return size


class WarabiStream(AbstractAsyncStreamedFile):  # type: ignore[misc]
    """A file that is read or written from start to end by the coroutines of an asyncio program.

    Like every coroutine here these run blocking calls in threads, one at a time.
    """

    def __init__(self, file: WarabiFile) -> None:
        self.file = file
        self.path, self.mode, self.fs = file.path, file.mode, file.fs
        self.size = file.size if file.mode == "rb" else None

    @property
    def loc(self) -> int:
        """The offset of the next byte."""
        offset: int = self.file.tell()
        return offset

    @property
    def closed(self) -> bool:
        closed: bool = self.file.closed
        return closed

    async def read(self, length: int | None = -1) -> bytes:
        length = -1 if length is None else length
        data: bytes = await asyncio.to_thread(self.file.read, length)
        return data

    async def write(self, data: Any) -> int:
        count: int = await asyncio.to_thread(self.file.write, data)
        return count

    async def flush(self, force: bool = False) -> None:
        await asyncio.to_thread(self.file.flush, force)

    async def close(self) -> None:
        await asyncio.to_thread(self.file.close)

    async def __aexit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None or self.mode == "rb":
            await self.close()
        else:  # what was written so far is no file
            await asyncio.to_thread(self.file.discard)
            self.file.closed = True
