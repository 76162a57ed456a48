"""The configuration of an engine: one schema for ``Engine`` and for the section ``margo`` of a
service.

Checked without pydantic, because clients, which have engines too, do without it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from warabi._core import config_keys
from warabi._core.config_keys import ENGINE
from warabi._core.tuning import SILENCE_TIMEOUT
from warabi.errors import ConfigError
from warabi.protocol import auth, limits
from warabi.protocol.auth import Security
from warabi.protocol.limits import EngineLimits
from warabi.protocol.pending import Patience

_LONGEST = 1_000_000_000
"""Longest timeout in seconds: system timers reject longer ones."""
KEYS = frozenset({"timeout", "deadline", "share", "limits", *auth.KEYS})
"""The keys that have an effect."""
_SECONDS = {"type": "number", "exclusiveMinimum": 0, "maximum": _LONGEST}
_PATH = {"type": "string", "minLength": 1}
_TOKEN = {"type": "string", "minLength": auth.SHORTEST_TOKEN}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "timeout": _SECONDS,
        "deadline": _SECONDS,
        "share": {"type": "boolean"},
        "insecure": {"type": "boolean"},
        "limits": limits.SCHEMA,
        "tls": {
            "type": "object",
            "properties": {
                **dict.fromkeys(auth.TLS_REQUIRED, _PATH), "server_name": {"type": "string"},
            },
            "required": list(auth.TLS_REQUIRED),
            "additionalProperties": False,
        },
        "token": _TOKEN,
        "token_file": _PATH,
        "read_only_token": _TOKEN,
        "read_only_token_file": _PATH,
        **{key: {} for key in sorted(config_keys.MARGO)},
    },
    "additionalProperties": False,
}  # fmt: skip
"""The same as JSON Schema (draft 2020-12), but for what depends on files or on two keys."""


@dataclass(frozen=True)
class EngineSettings:
    """A checked configuration; ``share``: whether direct access to regions is possible."""

    patience: Patience
    security: Security
    limits: EngineLimits
    share: bool
    without_effect: list[str]


def parse(config: str | dict[str, Any]) -> EngineSettings:
    """Check *config*, a dict or JSON text, and read the files that it names.

    Raises:
        ConfigError: invalid JSON, or a key that is unknown or has a wrong value; the message
            begins with its path.
        PermissionDenied: a file with a secret is accessible to every user.
    """
    if isinstance(config, str):
        try:
            config = json.loads(config or "{}")
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"engine configuration: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"engine configuration: expected an object, got {config!r:.60}")
    timeout = _seconds(config, "timeout", SILENCE_TIMEOUT)
    deadline = _seconds(config, "deadline", None)
    share = config.get("share", True)
    if not isinstance(share, bool):
        raise ConfigError(f"{ENGINE}.share: {share!r} is neither true nor false")
    for key in config:
        if key not in KEYS and key not in config_keys.MARGO:
            raise ConfigError(f"{ENGINE}.{key}: {config_keys.unknown(key, KEYS)}")
    if path := config_keys.misplaced(config):
        section = path.partition(".")[0]
        raise ConfigError(f"{ENGINE}.{path}: has no effect in {section}; move it one level up")
    return EngineSettings(
        Patience(timeout or SILENCE_TIMEOUT, deadline),
        auth.from_config(config),
        limits.from_config(config.get("limits")),
        share,
        sorted(config.keys() & config_keys.MARGO),
    )


def _seconds(config: dict[str, Any], key: str, default: float | None) -> float | None:
    if key not in config:
        return default
    value: Any = config[key]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 < value <= _LONGEST):
        raise ConfigError(
            f"{ENGINE}.{key}: {value!r} is not a number of seconds above 0 and up to {_LONGEST}"
        )
    return float(value)
