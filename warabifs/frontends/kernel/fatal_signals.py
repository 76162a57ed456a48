"""Detecting that a thread that waits for the mount is being killed.

The kernel notifies a FUSE file system of every signal for a thread that waits for a reply, also of
those for which the program has a handler.  Programs do not expect that ``read`` or ``write`` of a
regular file fails with ``EINTR`` for these, and with local file systems it does not.  So the test
is whether one of the pending signals kills the thread, whatever the reply will be.
"""

from __future__ import annotations

import functools
import os
import re
import signal
from pathlib import Path

_HARMLESS = (
    signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH, signal.SIGCONT,  # ignored by default
    signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU,  # stop it
)  # fmt: skip
_ENDS = ~sum(1 << number - 1 for number in _HARMLESS)
_KILL = 1 << signal.SIGKILL - 1
_SETS = re.compile(rb"^(SigPnd|ShdPnd|SigBlk|SigIgn|SigCgt):\s*([0-9a-f]+)$", re.MULTILINE)


@functools.cache
def _sees_threads() -> bool:
    """Whether ``/proc`` has the thread IDs that the kernel sends to this process."""
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False


def is_killed(thread: int) -> bool:
    """Whether the thread of that ID has a pending signal that kills it.

    False for 0, a thread in a PID namespace that is not visible here, and for one whose signals
    this process may not see.
    """
    if not thread or not _sees_threads():
        return False
    try:
        status = Path(f"/proc/{thread}/status").read_bytes()
    except OSError:
        return False
    sets = {name: int(value, 16) for name, value in _SETS.findall(status)}
    try:
        pending = sets[b"SigPnd"] | sets[b"ShdPnd"]
        # The kernel adds SIGKILL to the pending signals of every thread when a signal kills the
        # process.
        deadly = _ENDS & ~(sets[b"SigBlk"] | sets[b"SigIgn"] | sets[b"SigCgt"]) | _KILL
    except KeyError:
        return False
    return bool(pending & deadly)
