"""Open region files as blocks of code use them.

The contexts are written out: each access to a file passes them, and as generators they took
longer than the access.
"""

from __future__ import annotations

from collections.abc import Callable

from warabi import errors
from warabi.errors import CorruptTarget


class OpenFile:
    """An open region file and how many calls are using it."""

    __slots__ = ("fd", "users")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.users = 0


class Borrowed:
    """A region's descriptor, which *take* opened, and which stays open until *give_back*."""

    __slots__ = ("_give_back", "_held", "_rid")

    def __init__(
        self,
        rid: bytes,
        take: Callable[[bytes], OpenFile],
        give_back: Callable[[bytes, OpenFile], None],
    ) -> None:
        self._rid = rid
        self._held = take(rid)
        self._give_back = give_back

    def __enter__(self) -> int:
        return self._held.fd

    def __exit__(self, *exc: object) -> None:
        self._give_back(self._rid, self._held)


class Translated:
    """What the system refuses in the block is raised as the library's own."""

    __slots__ = ("_rid", "_what")

    def __init__(self, rid: bytes, what: str) -> None:
        self._rid = rid
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, FileNotFoundError):
            text = f"{self._what}: the file of region {self._rid.hex()} is missing"
            raise CorruptTarget(text) from error
        if isinstance(error, OSError):
            raise errors.from_os(error, f"{self._what} region {self._rid.hex()}") from error
