"""``Provider``: serves a target under an ID of an engine."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

from warabi._core import interrupts
from warabi.engine import Engine, state_of
from warabi.errors import ConfigError, Exception, TargetBusy
from warabi.protocol.address import parse
from warabi.provider.buffer_pool import DefaultTransfers, PipelineTransfers, Transfers
from warabi.provider.core import ProviderCore
from warabi.provider.migration.options import parse as migration_options
from warabi.provider.migration.send import Sending
from warabi.target import config as _config
from warabi.target import opening
from warabi.target.config import PipelineTransfer, ProviderConfig
from warabi.target.target import Target

__all__ = ["Exception", "Provider"]

_by_path: weakref.WeakValueDictionary[str, ProviderCore] = weakref.WeakValueDictionary()
"""Providers of this process that have, or had, a target open at a path."""


class Provider:
    """Serves a target under an ID of its engine.

    It serves until it is closed or its engine is finalized, even if the program keeps no reference
    to this object; an unreferenced provider is closed when a new one needs the same ID or path.

    Args:
        engine: a serving engine.
        provider_id: 0 to 65535, unused in that engine.
        config: dict or JSON text, see docs/backends.md.

    Raises:
        ConfigError: an invalid configuration, with its JSON path; or the target's path cannot be
            used.
        TargetBusy: the target is already open; the message names the process.
        CorruptTarget, StorageError, StorageFull, PermissionDenied: opening the target failed.
    """

    def __init__(
        self, engine: Engine, provider_id: int, config: dict[str, Any] | str = "{}"
    ) -> None:
        settings = _config.parse(config)
        state = state_of(engine) if isinstance(engine, Engine) else None
        if state is not None and state.parent:
            raise ConfigError(
                f"Provider: the engine {engine.addr()} belongs to process {state.parent},"
                " from which this one was forked; make an engine here"
            )
        runtime = state.runtime if state is not None else None
        if runtime is None or not engine.listening:
            raise ConfigError("Provider: needs an engine in server mode that is not finalized")
        _checked_id(provider_id)
        self._engine = engine  # kept alive by its providers
        self._runtime = runtime
        self._core = interrupts.creating(lambda: self._open(provider_id, settings), self._close)
        weakref.finalize(self, setattr, self._core, "abandoned", True).atexit = False

    def _open(self, provider_id: int, settings: ProviderConfig) -> ProviderCore:
        providers = self._runtime.providers
        previous = providers.get(provider_id)
        if previous is not None:
            if not previous.abandoned:
                raise ConfigError(f"provider_id: {provider_id} is taken at {self._engine.addr()}")
            previous.close()
        core = ProviderCore(provider_id, _open(settings), _transfers(settings))
        core.config = settings
        core.connect = state_of(self._engine).connections.alone
        core.on_adopt = _remember
        _remember(core)
        providers[provider_id] = core
        return core

    def _close(self, core: ProviderCore) -> None:
        if self._runtime.providers.get(core.provider_id) is core:
            del self._runtime.providers[core.provider_id]
        core.close()

    @property
    def provider_id(self) -> int:
        """Its number in the engine, 0 to 65535."""
        return self._core.provider_id

    @property
    def engine(self) -> Engine:
        """The engine in which it serves."""
        return self._engine

    def get_config(self) -> dict[str, Any]:
        """The effective configuration, defaults filled in."""
        settings = self._core.config
        config: dict[str, Any] = settings.model_dump(exclude_none=True)
        if settings.target is not None:
            config["target"]["config"].update(self._core.target.instead)
        return config

    def migrate_target(
        self,
        address: str,
        provider_id: int,
        options: dict[str, Any] | str | None = None,
        *,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """Move the target to a provider that has none, and return when that one serves it.

        Region IDs, sizes, bytes and times, all names with their attributes, and the target's
        UUID stay the same; the backend may be another.  Files that lost their last name and are
        still open somewhere stay behind.  Reads are served meanwhile; changes, of clients too,
        wait, and then fail, or go on when the migration failed.  Afterwards operations here raise
        ``TargetNotFound``, which says where the target went.  What can fail when, and what is
        left then: ``warabi.provider.migration``.

        Args:
            address: the destination's engine.
            provider_id: its provider.
            options: dict or JSON text, all of it optional: ``new_root``, the target's path at the
                destination, or a directory that it goes into under its file's name (a UUID, of
                a target in memory), the source's path unless given; ``transfer_size``, bytes of
                regions in a message, 0 for a size that suits; ``merge_config``, what is merged
                into the target's configuration, ``{"target": {"type": ..., "config": {...}}}``
                with or without the ``target`` around it; ``remove_source``, whether the target is
                removed here, true unless given.
            progress: called with the bytes of regions that the destination has, and those of
                all; what it raises ends the migration.  It must not change the target.

        Raises:
            ConfigError: an option, with its JSON path; the destination has a target already, or
                cannot have one there.
            TargetNotFound: there is none here.
            TargetBusy: a migration is under way here or there, or the path is in use there.
            PermissionDenied: the destination does not let this process bring a target.
            ProviderNotFound, ConnectionFailed, ConnectionLost, TimedOut, ProtocolError: the
                destination cannot be reached, or no more.
            StorageFull, StorageError, CorruptTarget: the storage failed, here or there.
        """
        where = (str(parse(str(address))), _checked_id(provider_id))
        sending = Sending(self._core, where, migration_options(options), progress)
        interrupts.uninterrupted(sending.run)  # which it interrupts at safe points

    def close(self) -> None:
        """Stop serving and close the target, which keeps its regions.  Idempotent."""
        interrupts.uninterrupted(self._close, self._core)

    def __reduce__(self) -> str:
        raise TypeError(
            "a Provider cannot be pickled or copied, its target belongs to this process; pass a"
            " TargetHandle, which reaches it from any process"
        )

    def __repr__(self) -> str:
        place = f"{str(self._engine.addr())!r}, {self.provider_id}"
        try:
            return f"Provider({place}, target {self._core.target.uuid})"
        except Exception:
            return f"Provider({place}, without a target)"

    def __bool__(self) -> bool:
        return self._runtime.providers.get(self.provider_id) is self._core

    def __enter__(self) -> Provider:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _checked_id(provider_id: int) -> int:
    if (
        isinstance(provider_id, bool)
        or not isinstance(provider_id, int)
        or not 0 <= provider_id <= 65535
    ):
        raise ConfigError(f"provider_id: expected 0 to 65535, got {provider_id!r}")
    return provider_id


def _remember(core: ProviderCore) -> None:
    """Record which path a provider has open."""
    target = core.config.target
    if target is not None and target.path is not None:
        _by_path[os.path.realpath(target.path)] = core


def _transfers(settings: ProviderConfig) -> Transfers:
    manager = settings.transfer_manager
    if isinstance(manager, PipelineTransfer):
        return PipelineTransfers(**manager.config.model_dump())
    return DefaultTransfers()


def _open(settings: ProviderConfig) -> Target | None:
    target = settings.target
    if target is None:
        return None
    try:
        return opening.open_target(target)
    except TargetBusy:
        # Possibly by an unreferenced provider of this process.
        holder = _by_path.get(os.path.realpath(target.path or ""))
        if holder is None or not holder.abandoned:
            raise
        holder.close()
        return opening.open_target(target)
