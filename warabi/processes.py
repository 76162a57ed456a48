"""Pickling of handles and clients for other processes.

A pickle of a ``TargetHandle`` has the address, the provider's ID, whether it is read-only, and the
settings of its engine for connecting: ``timeout``, ``share``, and the paths of certificates and of
a ``token_file``.  **Secrets are not put in pickles**, which may be stored in queues, caches and
files: a handle whose engine has a ``token`` as text cannot be pickled.

A process that unpickles uses the engine of that address, if it is its own, or one client's engine
for each configuration, which is created when first needed and ends with the process.
"""

from __future__ import annotations

import json
import os
import weakref
from typing import TYPE_CHECKING, Any

from warabi._core import forks

if TYPE_CHECKING:
    from warabi.engine import Engine

_CONNECTING = ("timeout", "deadline", "share")
_TOKENS = ("token", "read_only_token")
_PATHS = ("certificate", "key", "ca")


def portable(addr: str, config: Any) -> dict[str, Any] | str:
    """Return the part of an engine's validated configuration that another process needs to connect
    in the same way; or a message why that is not possible."""
    if isinstance(config, str):
        config = json.loads(config or "{}")
    found: dict[str, Any] = {key: config[key] for key in _CONNECTING if key in config}
    for key in _TOKENS:
        if config.get(key) is not None:
            return f"the configuration of its engine has a {key} as text: use {key}_file"
        if config.get(f"{key}_file") is not None:
            found[f"{key}_file"] = os.path.abspath(os.fspath(config[f"{key}_file"]))
    if (tls := config.get("tls")) is not None:
        found["tls"] = {
            key: os.path.abspath(os.fspath(value)) if key in _PATHS else value
            for key, value in tls.items()
        }
    return {"transport": addr.partition(":")[0], "config": found}


def settings_of(engine: Engine, what: str) -> dict[str, Any]:
    """Return the settings of *engine* to pickle with a *what*.

    Raises:
        TypeError: there is a secret in its configuration.
    """
    from warabi.engine import state_of

    settings = state_of(engine).portable
    if isinstance(settings, str):
        raise TypeError(f"this {what} cannot be pickled, {settings}")
    return settings


class _Engines:
    """The engines of this process."""

    def __init__(self) -> None:
        self._lock = forks.lock()
        self._all: weakref.WeakSet[Engine] = weakref.WeakSet()
        self._made: dict[str, Engine] = {}  # by their settings

    def remember(self, engine: Engine) -> None:
        self._all.add(engine)

    def serving(self, text: str) -> Engine | None:
        for engine in list(self._all):
            if engine.listening and str(engine.addr()) == text:
                return engine
        return None

    def made(self, settings: dict[str, Any]) -> Engine:
        from warabi.engine import Engine, client, state_of

        key = json.dumps(settings, sort_keys=True)
        with self._lock:
            engine = self._made.get(key)
            if engine is None or state_of(engine).finalized.is_set():
                engine = Engine(settings["transport"], client, config=settings["config"])
                self._made[key] = engine
            return engine


_engines = _Engines()
remember = _engines.remember


def engine_for(settings: dict[str, Any], address: str = "") -> Engine:
    """Return this process's engine for a pickle with *settings*: the one that serves at *address*,
    or a client's.

    Raises:
        ConfigError, PermissionDenied: a file in the configuration is not usable here.
    """
    return _engines.serving(address) or _engines.made(settings)
