"""The interface of front ends, which connect the kernel's FUSE requests to a :class:`FileSystem`.

A front end receives requests, calls the file system, replies, and sends cache invalidations.

A front end translates, and decides nothing.  What a request means is in ``warabifs/fs/``; mounting
and unmounting are in ``warabifs/mount/``.  Neither depends on which front end it is.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from warabi._core.counters import Counters
from warabifs.frontends.notifier import Notifier

if TYPE_CHECKING:  # options, which need no more than names of abilities, are parsed without these
    from warabi.target.target import Target as LocalTarget
    from warabifs.frontends.device import Device
    from warabifs.fs.filesystem import FileSystem


class Ability(enum.StrEnum):
    """Optional features of a front end; docs/mount-options.md lists those that one lacks."""

    DIRECT_IO = "direct_io"
    """Reads and writes bypass the page cache: ``-o direct_io``."""
    WRITEBACK = "writeback"
    """The kernel caches writes: ``-o exclusive``."""
    PASSTHROUGH = "passthrough"
    """The kernel reads and writes region files without requests: ``-o passthrough``."""
    OPENLESS = "openless"
    """Files of an embedded target need neither OPEN nor RELEASE."""
    INTERRUPT = "interrupt"
    """A program that waits for a provider can be killed."""
    UMASK = "umask"
    """The file system applies the umask, so a default access control list can replace it."""
    KILL_SETID = "kill_setid"
    """Requests say whether a write clears set-ID bits; without it the kernel queries the
    capabilities of a file before each write."""
    FORGET_RANGE = "forget_range"
    """A range of a file's cached pages can be invalidated; without it all of them are."""
    DIRECT_MMAP = "direct_mmap"
    """A file that bypasses the page cache can be mapped shared: one of an engine that is open to
    append, and any with ``-o direct_io``."""
    KEEP_PAGES = "keep_pages"
    """The mount's own writes do not drop cached pages, where the provider reports which client
    changed a file."""
    REQUEST_FLAGS = "request_flags"
    """Reads and writes have the ID of the thread, and the current flags of the open file, such as
    ``O_APPEND`` set with fcntl(2)."""
    FALLOCATE = "fallocate"
    """fallocate(2) reserves space, and punches and zeroes holes."""
    SEEK_DATA = "seek_data"
    """lseek(2) finds data and holes (``SEEK_DATA``, ``SEEK_HOLE``)."""
    LOCKS = "locks"
    """Locks are kept by the provider, so that its other mounts see them: ``-o local_lock``."""
    COPY_RANGE = "copy_range"
    """copy_file_range(2) has the target copy; without it the kernel reads and writes."""
    TMPFILE = "tmpfile"
    """open(2) with ``O_TMPFILE`` makes files without names."""
    CACHE_SYMLINKS = "cache_symlinks"
    """The kernel keeps the targets of symbolic links."""
    CACHE_LISTINGS = "cache_listings"
    """The kernel keeps listings of directories."""
    IDMAP = "idmap"
    """Idmapped mounts can be made of the mount, for containers."""
    BIRTH_TIME = "birth_time"
    """statx(2) tells when a file was made."""
    INODE_FLAGS = "inode_flags"
    """chattr(1) and lsattr(1) set and show flags."""
    XATTR_FLAGS = "xattr_flags"
    """setxattr(2) with ``XATTR_CREATE`` or ``XATTR_REPLACE`` is atomic."""


@dataclass(frozen=True)
class Settings:
    """How a mount is to be served.

    Attributes:
        entry_timeout: seconds for which the kernel may cache a name.
        directory_timeout: likewise, if it is a directory's.
        attr_timeout: seconds for which it may cache attributes.
        negative_timeout: seconds for which it may cache that a name does not exist.
        direct_io: whether reads and writes bypass the page cache.
        writeback: whether the kernel may cache writes until a file is closed or synced.
        passthrough: the target whose regions the kernel is to read and write by itself, if any.
        interruptible: whether a program that waits for a request can be killed; false if it
            waits for storage in this process.
        read_ahead: KiB that the kernel reads ahead, at least.
        locks: which locks of programs the target keeps, so that other clients see them: ``flock``,
            ``posix``.  The kernel keeps the others.
    """

    entry_timeout: float
    directory_timeout: float
    attr_timeout: float
    negative_timeout: float
    direct_io: bool
    writeback: bool
    passthrough: LocalTarget | None
    interruptible: bool
    read_ahead: int
    locks: frozenset[str] = frozenset()


class FrontEnd(ABC):
    """The connection of one mount to the kernel.

    Methods that invalidate the kernel's caches may be passed on before :meth:`begin`; then
    :meth:`begin` is called once, :meth:`serve` once, and :meth:`close` in any case.

    Args:
        device: ``/dev/fuse``, mounted; the caller closes it after the front end.

    Attributes:
        counters: of the kernel's requests.
    """

    def __init__(self, device: Device) -> None:
        self.counters = Counters(self.request_name)
        self._device = device
        self._notifier = Notifier()

    # For the mount

    @abstractmethod
    def begin(self, files: FileSystem, settings: Settings) -> frozenset[Ability]:
        """Agree with the kernel on how *files* are served; returns the abilities that it has, too.

        Raises:
            OSError: the mount was over before it began.
            ValueError: it cannot serve this mount; the message says why, such as how old the
                kernel is.
            TimeoutError: the kernel sends nothing.
        """

    @abstractmethod
    async def serve(self) -> None:
        """Serve until the file system is unmounted or :meth:`stop` is called.

        Pending requests are completed.
        """

    @abstractmethod
    def stop(self) -> None:
        """Read no more requests; :meth:`serve` returns when pending ones are completed."""

    @abstractmethod
    def close(self) -> None:
        """Send no more notifications to the kernel, and release what :meth:`begin` acquired.

        A thread that is blocked in the kernel is waited for only briefly; it does no harm.
        """

    @staticmethod
    def request_name(key: str | int) -> str:
        """Return the name of a request, given the key with which the front end counts it."""
        return str(key)

    # For the file system: notifications to the kernel

    @abstractmethod
    def forget_inode(self, ino: int, attributes_only: bool) -> None:
        """Drop an inode's cached attributes and, unless *attributes_only*, its cached pages.

        Waits for requests that concern it, so it must not be called in the loop that serves them.

        Raises:
            FileNotFoundError: the kernel does not know it.
            OSError: the mount is over.
        """

    @abstractmethod
    def forget_bytes(self, ino: int, offset: int, size: int) -> None:
        """Write back and drop cached pages of an inode; the same as :meth:`forget_inode`."""

    @abstractmethod
    def forget_name(self, directory: int, name: bytes) -> None:
        """The same as :meth:`forget_inode`, for a dentry."""

    def drop_name(self, directory: int, name: bytes) -> None:
        """Make the kernel drop a dentry, asynchronously in a thread."""
        self._notifier.soon(lambda: self.forget_name(directory, name))

    def drop_attributes(self, ino: int) -> None:
        """Make the kernel drop an inode's attributes, asynchronously in a thread."""
        self._notifier.soon(lambda: self.forget_inode(ino, True))

    def drop_bytes(self, ino: int, offset: int, size: int) -> None:
        """Make the kernel forget some bytes of an inode, or more, in a thread, soon."""
        self._notifier.soon(lambda: self.forget_bytes(ino, offset, size))
