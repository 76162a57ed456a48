"""The documented import name of :mod:`warabi.engine`."""

from warabi.engine import Address, Engine, client, server

__all__ = ["Address", "Engine", "client", "server"]
