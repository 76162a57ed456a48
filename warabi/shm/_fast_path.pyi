"""Reads and writes of a guest in granted regions: what ``_fast_path.c`` defines.

This is the frequent side of the protocol in ``target/leases.py``: it needs no system call for
regions in memory, and no lock, since a hazard slot belongs to one access while it is not free.
``client.py`` has the rest.
"""

from typing import Any

from _typeshed import ReadableBuffer, WriteableBuffer

from warabi.shm.memory import SharedMapping

class Grant:
    """A region that may be accessed, in a file or in memory.

    Args:
        index: where in the table its version and its size are.
        version: the version for as long as this grant is valid.
        room: bytes that can be accessed, whatever the size; negative if the grant was refused.
        fd: the file; closed when this object is deallocated.
        keeper: keeps *view*, or *fd*, which then is not closed here, valid.
        view: the memory.
        start: where the region begins in the file or the memory.

    Raises:
        ValueError: *room* exceeds the memory.
    """

    index: int
    version: int
    room: int
    fd: int
    owns: bool
    start: int

    def __init__(
        self,
        index: int,
        version: int,
        room: int,
        fd: int = -1,
        keeper: object = None,
        view: ReadableBuffer = ...,
        start: int = 0,
    ) -> None: ...

class FastPath:
    """Accesses granted regions.

    Args:
        life: has the liveness word of the provider.
        table, write_times, hazards: as in ``target/leases.py``.
        word: index of the liveness word in *life*, in words of 4 bytes.
        alive: its value while the provider lives.
        writable: whether regions may be written.

    Attributes:
        grants: by region.
        table: its words, of 8 bytes.
        usable: whether accesses are allowed.
        writable: as above.
        in_memory: whether files of regions are, so that reading them never waits for a device.
    """

    grants: dict[bytes, Grant]
    table: memoryview[int]
    usable: bool
    writable: bool
    in_memory: bool

    def __init__(
        self,
        life: SharedMapping,
        table: SharedMapping,
        write_times: SharedMapping,
        hazards: SharedMapping,
        word: int,
        alive: int,
        writable: bool,
    ) -> None: ...
    @property
    def living(self) -> bool:
        """Whether the provider lives."""

    @property
    def busy(self) -> int:
        """Number of pending accesses."""

    @property
    def recent(self) -> tuple[int, ...]:
        """The last-write times that this guest stored most recently."""

    def _drop(self, region: bytes, grant: Grant) -> None:
        """Called with a grant that is no longer valid; subclasses define it."""

    def _failure(self, region: bytes, error: OSError) -> Exception:
        """Return the exception to raise for an I/O error; subclasses define it."""

    def size(self, region: bytes, /) -> int:
        """Return the size of a granted region in bytes; -1 if the provider must be asked."""

    def write(self, region: bytes, offset: int, data: ReadableBuffer, /) -> bool:
        """Write *data*, all of it within the region; False if the provider must do it.

        Raises:
            StorageFull, StorageError: writing failed.
        """

    def try_write(self, region: Any, offset: Any, data: Any, /) -> bool:
        """The same as :meth:`write` for unchecked arguments; False also for valid ones that need
        further checks."""

    def read_some(
        self,
        region: bytes,
        offset: int,
        place: WriteableBuffer,
        wait: bool = True,
        short: bool = True,
        /,
    ) -> int:
        """Fill *place* from within the region; returns the number of bytes read, or -1 if the
        provider must do it.

        *place* may have been modified then.  Without *wait* it also fails if the bytes are not in
        memory.  With *short* the region may end before *place* does.
        """

    def try_read(self, region: Any, offset: Any, place: Any, /) -> bool:
        """Fill *place*, for unchecked arguments as :meth:`try_write`; False if the provider must do
        it."""
