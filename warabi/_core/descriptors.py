"""How many descriptors this process may have, and how errors tell that there are no more.

A process that serves, a provider or a mount, raises its limit as far as it may.  A program that
uses the library keeps its own: it may count on ``select(2)``, which knows 1024 only.
"""

from __future__ import annotations

import contextlib
import errno
import resource

_MOST = 1 << 20
"""More are of no use here, and some programs close as many as they may have when they start."""


def limit() -> int:
    """How many descriptors this process may have now."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else soft


def raise_limit() -> None:
    """Let this process have as many as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def are_short(error: OSError) -> bool:
    """Whether *error* says that this process, or the system, has no descriptor left."""
    return error.errno in (errno.EMFILE, errno.ENFILE)
