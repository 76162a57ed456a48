"""The documented ``Provider``."""

from __future__ import annotations

import os
import weakref
from typing import Any

from warabi import config as _config
from warabi import layout
from warabi.config import MemoryTarget, PipelineTransfer, ProviderConfig
from warabi.engine import Engine
from warabi.errors import ConfigError, Exception, TargetBusy
from warabi.provider import ProviderCore
from warabi.target import Target
from warabi.transfer import DefaultTransfers, PipelineTransfers, Transfers

__all__ = ["Exception", "Provider"]

_by_path: weakref.WeakValueDictionary[str, ProviderCore] = weakref.WeakValueDictionary()
"""Providers of this process that have, or had, a target open on a path."""


class Provider:
    """Serves a target under an ID of its engine.

    It serves until it is closed or its engine is finalized, also when the program keeps no
    reference to this object; a provider that nobody refers to any more makes room for a new
    one of the same ID, or on the same path.

    Args:
        engine: a serving engine.
        provider_id: 0 to 65535, not taken in that engine.
        config: dict or JSON text, see the README's table of backends.

    Raises:
        ConfigError: what is wrong, with its JSON path; or the target's path cannot be used.
        TargetBusy: the target is open elsewhere; the message names the process.
        CorruptTarget, StorageError, StorageFull, PermissionDenied: opening the target failed.
    """

    def __init__(
        self, engine: Engine, provider_id: int, config: dict[str, Any] | str = "{}"
    ) -> None:
        self._config = _config.parse(config)
        runtime = engine._state.runtime if isinstance(engine, Engine) else None
        if runtime is None or not engine.listening:
            raise ConfigError("Provider: needs an engine in server mode that is not finalized")
        if (
            isinstance(provider_id, bool)
            or not isinstance(provider_id, int)
            or not 0 <= provider_id <= 65535
        ):
            raise ConfigError(f"provider_id: expected 0 to 65535, got {provider_id!r}")
        previous = runtime.providers.get(provider_id)
        if previous is not None:
            if not previous.abandoned:
                raise ConfigError(f"provider_id: {provider_id} is taken at {engine.addr()}")
            previous.close()
        self._engine = engine  # lives as long as its providers
        self._runtime = runtime
        transfers = _transfers(self._config)
        self._core = ProviderCore(provider_id, _open(self._config), transfers)
        runtime.providers[provider_id] = self._core
        target = self._config.target
        if target is not None and not isinstance(target, MemoryTarget):
            _by_path[os.path.realpath(target.config.path)] = self._core
        weakref.finalize(self, setattr, self._core, "abandoned", True).atexit = False

    @property
    def provider_id(self) -> int:
        return self._core.provider_id

    def get_config(self) -> dict[str, Any]:
        """The effective configuration, defaults filled in."""
        config: dict[str, Any] = self._config.model_dump(exclude_none=True)
        if self._config.target is not None:
            config["target"]["config"].update(self._core.target.instead)
        return config

    def close(self) -> None:
        """Stop serving and close the target, which keeps its regions.  Idempotent."""
        if self._runtime.providers.get(self.provider_id) is self._core:
            del self._runtime.providers[self.provider_id]
        self._core.close()

    def __bool__(self) -> bool:
        return self._runtime.providers.get(self.provider_id) is self._core

    def __enter__(self) -> Provider:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _transfers(settings: ProviderConfig) -> Transfers:
    manager = settings.transfer_manager
    if isinstance(manager, PipelineTransfer):
        return PipelineTransfers(**manager.config.model_dump())
    return DefaultTransfers()


def _open(settings: ProviderConfig) -> Target | None:
    target = settings.target
    if target is None:
        return None
    if isinstance(target, MemoryTarget):
        return layout.open_memory(target.config)
    try:
        return layout.open_target(target)
    except TargetBusy:
        # Perhaps by ourselves, for a provider that nobody can reach through its object any more.
        holder = _by_path.get(os.path.realpath(target.config.path))
        if holder is None or not holder.abandoned:
            raise
        holder.close()
        return layout.open_target(target)
