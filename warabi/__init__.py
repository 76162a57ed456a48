"""Warabi in Python: a blob store for HPC.  See ``warabi.client``, ``warabi.server``, ``warabi.aio``."""

__version__ = "0.1.0"
