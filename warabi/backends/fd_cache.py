"""Context managers for calls on region files; classes, at half the cost of generators."""

from __future__ import annotations

from collections.abc import Callable

from warabi import errors
from warabi.errors import CorruptTarget


class OpenFile:
    """An open region file, and the number of calls that use it."""

    __slots__ = ("fd", "users")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.users = 0


class Borrowed:
    """Keeps a region's descriptor open in the block."""

    __slots__ = ("_file", "_give_back", "_rid", "_take")

    def __init__(
        self,
        rid: bytes,
        take: Callable[[bytes], OpenFile],
        give_back: Callable[[bytes, OpenFile], None],
    ) -> None:
        self._rid = rid
        self._take = take
        self._give_back = give_back

    def __enter__(self) -> int:
        self._file = self._take(self._rid)
        return self._file.fd

    def __exit__(self, *exc: object) -> None:
        self._give_back(self._rid, self._file)


class Translated:
    """Converts errors of system calls to the library's; the message names the operation *what*."""

    __slots__ = ("_rid", "_what")

    def __init__(self, rid: bytes, what: str) -> None:
        self._rid = rid
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError):
            return
        what, name = self._what, self._rid.hex()
        if isinstance(error, FileNotFoundError):
            raise CorruptTarget(f"{what}: the file of region {name} is missing") from error
        raise errors.from_os(error, f"{what} region {name}") from error
