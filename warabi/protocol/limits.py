"""How much an engine takes from its peers: the ``limits`` of its configuration."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from warabi._core import config_keys
from warabi.errors import ConfigError
from warabi.protocol import wire

_WHERE = "engine configuration: $.limits"
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
    """What a serving engine takes.

    Attributes:
        connections: connections that have opened; more are refused.
        connections_per_host: how many of them one host may have, over TCP.
        unopened: connections that have said nothing yet, or not enough; the oldest of more
            is dropped.
        requests: requests on one connection that are not answered yet; more wait.
        payload: bytes of one payload; clients split what is larger.
        outstanding: bytes of one connection's requests and replies that are under way, in
            memory; more wait.  One payload that is being received comes on top.
    """

    connections: int = 1024
    connections_per_host: int = 768
    unopened: int = 128
    requests: int = 256
    payload: int = 4 << 20
    outstanding: int = 64 << 20

    @property
    def wire(self) -> wire.Limits:
        """What the engine's openings say."""
        return wire.Limits(payload=self.payload, requests=self.requests)


def from_config(section: Any) -> EngineLimits:
    """The limits that the ``limits`` of an engine's configuration sets, defaults filled in.

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
