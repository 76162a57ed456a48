"""The documented import name of :mod:`warabi.server`."""

from warabi.server import Exception, Provider

__all__ = ["Exception", "Provider"]
