"""Buffers for the data of reads, between the socket and the kernel.

A buffer is allocated when the data arrive, not when they are requested, and released just before
they are copied out.  So the replies to many requests use one buffer in turn, which stays in the
processor's caches, instead of one buffer per request.
"""

from __future__ import annotations

from warabifs.fs.request_size import MAX_WRITE

_SPARE = 8  # for concurrent reads; allocating one takes as long as a read


class Buffers:
    """A stack of buffers, each large enough for one read."""

    def __init__(self) -> None:
        self._spare = [memoryview(bytearray(MAX_WRITE))]

    def loan(self, size: int) -> BufferLoan:
        """Return a context manager for a buffer of *size* bytes, at most ``MAX_WRITE``.

        Its contents stay valid after the block until the task next awaits.
        """
        return BufferLoan(self._spare, size)


class BufferLoan:
    """A buffer that is allocated on first use.

    Attributes:
        taken: the buffer, or an empty one before :meth:`place` was called.
    """

    __slots__ = ("_buffer", "_size", "_spare", "taken")

    def __init__(self, spare: list[memoryview], size: int) -> None:
        self._spare = spare
        self._size = size
        self._buffer: memoryview | None = None
        self.taken = memoryview(b"")

    def place(self) -> memoryview:
        """Return the buffer; the first call allocates it."""
        if self._buffer is None:
            self._buffer = self._spare.pop() if self._spare else memoryview(bytearray(MAX_WRITE))
            self.taken = self._buffer[: self._size]
        return self.taken

    def __enter__(self) -> BufferLoan:
        return self

    def __exit__(self, *_: object) -> None:
        if self._buffer is not None and len(self._spare) < _SPARE:
            self._spare.append(self._buffer)
