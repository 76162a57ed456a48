"""The default front end: the FUSE protocol on ``/dev/fuse``, without a library."""

from __future__ import annotations

from warabifs.frontends.base import Ability, FrontEnd, Settings
from warabifs.frontends.device import Device
from warabifs.frontends.kernel import protocol
from warabifs.frontends.kernel.dispatch import Operations, name_of
from warabifs.frontends.kernel.passthrough import Passing
from warabifs.frontends.kernel.protocol import Feature
from warabifs.frontends.kernel.session import FuseSession
from warabifs.fs.filesystem import FileSystem

_FEATURES = {
    Ability.WRITEBACK: Feature.WRITEBACK_CACHE,
    Ability.PASSTHROUGH: Feature.PASSTHROUGH,
    Ability.UMASK: Feature.DONT_MASK,
    Ability.KILL_SETID: Feature.HANDLE_KILLPRIV_V2,
    Ability.CACHE_SYMLINKS: Feature.CACHE_SYMLINKS,
    Ability.DIRECT_MMAP: Feature.DIRECT_IO_ALLOW_MMAP,
    Ability.IDMAP: Feature.ALLOW_IDMAP,
}
"""Abilities that the kernel has to have, too."""


class KernelFrontEnd(FrontEnd):
    """A mount served on ``/dev/fuse``: :class:`FuseSession` with :class:`Operations`."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._session = FuseSession(device.fd, self._notifier, self.counters)
        self._operations: Operations | None = None

    def begin(self, files: FileSystem, settings: Settings) -> frozenset[Ability]:
        passed = settings.passthrough
        operations = self._operations = Operations(
            files,
            attr_timeout=settings.attr_timeout,
            entry_timeout=settings.entry_timeout,
            directory_timeout=settings.directory_timeout,
            negative_timeout=settings.negative_timeout,
            direct_io=settings.direct_io,
            writeback=settings.writeback,
            passing=None if passed is None else Passing(passed, self._session),
            interrupt=self._session.interrupt if settings.interruptible else None,
            locks=settings.locks,
            counters=self.counters,
        )
        operations.features = self._session.begin(operations.features)
        self._device.read_ahead(settings.read_ahead)
        return frozenset(
            ability for ability in Ability if operations.features & _FEATURES.get(ability, -1)
        )

    @staticmethod
    def request_name(key: str | int) -> str:
        return name_of(int(key))

    async def serve(self) -> None:
        assert self._operations is not None
        await self._session.serve(self._operations)

    def stop(self) -> None:
        self._session.stop()

    def close(self) -> None:
        self._notifier.silence()

    def forget_inode(self, ino: int, attributes_only: bool) -> None:
        self._session.notify(protocol.forget_inode(ino, -1 if attributes_only else 0))

    def forget_bytes(self, ino: int, offset: int, size: int) -> None:
        self._session.notify(protocol.forget_inode(ino, offset, size))

    def forget_name(self, directory: int, name: bytes) -> None:
        self._session.notify(protocol.forget_name(directory, name))
