"""Limits on what an engine accepts from its peers: ``limits`` in its configuration."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from warabi._core import config_keys
from warabi.errors import ConfigError
from warabi.protocol import wire

_WHERE = f"{config_keys.ENGINE}.limits"
_BOUNDS = {
    "connections": (1, 1 << 20),
    "connections_per_host": (1, 1 << 20),
    "unopened": (1, 1 << 20),
    "requests": (1, 1 << 16),
    "payload": (1 << 20, 4 << 20),  # a mount reads 1 MiB at once; clients receive 4 MiB
    "outstanding": (1 << 20, 1 << 40),
}


@dataclass(frozen=True)
class EngineLimits:
    """The limits of a serving engine.

    Attributes:
        connections: most connections after the handshake; more are refused.
        connections_per_host: most of them from one host, over TCP.
        unopened: most connections before the end of the handshake; if there are more, the oldest
            is dropped.
        requests: most pending requests of one connection; more wait.
        payload: most bytes of one payload; clients split larger transfers.
        outstanding: most bytes in memory for one connection's pending requests and replies; more
            wait.  One payload that is being received is not included.
    """

    connections: int = 1024
    connections_per_host: int = 768
    unopened: int = 128
    requests: int = 256
    payload: int = 4 << 20
    outstanding: int = 64 << 20

    @property
    def wire(self) -> wire.Limits:
        """The limits that the engine's openings announce."""
        return wire.Limits(payload=self.payload, requests=self.requests)


SCHEMA = {
    "type": "object",
    "properties": {
        field.name: {
            "type": "integer",
            "minimum": _BOUNDS[field.name][0],
            "maximum": _BOUNDS[field.name][1],
            "default": field.default,
        }
        for field in fields(EngineLimits)
    },
    "additionalProperties": False,
}


def from_config(section: Any) -> EngineLimits:
    """Parse the ``limits`` of an engine's configuration; missing keys get their defaults.

    Raises:
        ConfigError: an unknown key, or a number out of range.
    """
    if section is None:
        return EngineLimits()
    if not isinstance(section, dict):
        raise ConfigError(f"{_WHERE}: expected an object")
    known = [field.name for field in fields(EngineLimits)]
    for key, value in section.items():
        if key not in known:
            raise ConfigError(f"{_WHERE}.{key}: {config_keys.unknown(key, known)}")
        low, high = _BOUNDS[key]
        if type(value) is not int or not low <= value <= high:
            raise ConfigError(f"{_WHERE}.{key}: expected {low} to {high}, got {value!r:.60}")
    found = EngineLimits(**section)
    if found.outstanding < found.payload:
        raise ConfigError(
            f"{_WHERE}.outstanding: {found.outstanding} is less than one payload, {found.payload}"
        )
    return found
