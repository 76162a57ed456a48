"""Region IDs: 16 bytes, of a slot number and a generation.

A region ID is a slot number and a random generation.  A slot may be reused after an erase, a
generation is not, so an erased or foreign ID never resolves, without tombstones.
"""

from __future__ import annotations

import struct

from warabi.errors import InvalidRegion

_PARTS = struct.Struct(">QQ")


class RegionID(bytes):
    """Sixteen opaque bytes that identify a region: slot and generation, both big-endian u64.

    Immutable, hashable, orderable and picklable.  ``RegionID()`` is all zero and identifies
    nothing.

    Raises:
        InvalidRegion: *data* is not a bytes-like object of exactly 16 bytes.
    """

    __slots__ = ()

    def __new__(cls, data: bytes | bytearray | memoryview = bytes(16)) -> RegionID:
        if isinstance(data, memoryview):
            data = data.tobytes()  # its len() counts items
        if not isinstance(data, (bytes, bytearray)) or len(data) != 16:
            what = f"{len(data)} bytes" if isinstance(data, (bytes, bytearray)) else repr(data)
            raise InvalidRegion(f"a region ID is exactly 16 bytes, got {what}")
        return super().__new__(cls, data)

    @classmethod
    def from_parts(cls, slot: int, generation: int) -> RegionID:
        """The ID of *generation* in *slot*; both fit in 64 bits, unsigned."""
        return bytes.__new__(cls, _PARTS.pack(slot, generation))

    @property
    def slot(self) -> int:
        """The slot half; the catalogue's key, and the inode number of the region's file."""
        return int.from_bytes(self[:8], "big")

    @property
    def generation(self) -> int:
        """The random half."""
        return int.from_bytes(self[8:], "big")

    def to_bytes(self) -> bytes:
        """Return the 16 bytes, from which ``RegionID(data)`` creates the ID again."""
        return bytes(self)

    def __repr__(self) -> str:
        return f"RegionID({self.hex()})"

    __str__ = __repr__

    def __reduce__(self) -> tuple[type[RegionID], tuple[bytes]]:
        return (RegionID, (bytes(self),))
