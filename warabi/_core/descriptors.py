"""The limit on open file descriptors, and errors when it is reached.

A serving process, provider or mount, raises its soft limit to the hard limit.  A program that uses
the library keeps its own: it may use ``select(2)``, which is restricted to 1024.
"""

from __future__ import annotations

import contextlib
import errno
import resource

_MOST = 1 << 20
"""More are not needed, and some programs close all possible descriptors when they start."""


def limit() -> int:
    """Return the current limit on descriptors of this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else soft


def raise_limit() -> None:
    """Raise the soft limit to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def are_short(error: OSError) -> bool:
    """Whether *error* means that this process, or the system, has no descriptor left."""
    return error.errno in (errno.EMFILE, errno.ENFILE)
