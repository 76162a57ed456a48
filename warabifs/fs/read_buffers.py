"""Where the bytes of a mount's reads are, between the socket and the kernel.

A buffer is taken when the bytes come, and not when they are asked for, and given back when they are
about to be copied out.  So replies to many requests go through one buffer, one after the other,
which the processor's caches hold, and not through as many as there are requests.
"""

from __future__ import annotations

from warabifs.fs.limits import MAX_WRITE

_SPARE = 8  # for reads side by side; to make one takes as long as a read


class Buffers:
    """Buffers for one read each; the one that was used last is taken first."""

    def __init__(self) -> None:
        self._spare = [memoryview(bytearray(MAX_WRITE))]

    def loan(self, size: int) -> BufferLoan:
        """A buffer of *size* bytes, ``MAX_WRITE`` at most, for as long as the block runs.

        What is in it stays valid after that until the task waits for anything.
        """
        return BufferLoan(self._spare, size)


class BufferLoan:
    """At most one buffer.

    Attributes:
        taken: it, or nothing.
    """

    __slots__ = ("_buffer", "_size", "_spare", "taken")

    def __init__(self, spare: list[memoryview], size: int) -> None:
        self._spare = spare
        self._size = size
        self._buffer: memoryview | None = None
        self.taken = memoryview(b"")

    def place(self) -> memoryview:
        """The buffer, which is taken now if it was not before."""
        if self._buffer is None:
            self._buffer = self._spare.pop() if self._spare else memoryview(bytearray(MAX_WRITE))
            self.taken = self._buffer[: self._size]
        return self.taken

    def __enter__(self) -> BufferLoan:
        return self

    def __exit__(self, *_: object) -> None:
        if self._buffer is not None and len(self._spare) < _SPARE:
            self._spare.append(self._buffer)
