"""Warabi in Python: a blob store for HPC.

Start at :mod:`warabi.client`, :mod:`warabi.server`, or :mod:`warabi.aio` for Trio programs.
"""

__version__ = "0.1.0"
