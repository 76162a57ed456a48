"""Liveness of the thread that created shared memory.

``LifeSign`` is a word that changes when its owner's thread ends, for whatever reason: a robust
mutex (pthread_mutexattr_setrobust(3)) that the thread holds.  The kernel itself modifies the word,
also after SIGKILL, before the process can be waited for.
"""

from __future__ import annotations

import errno
import mmap
import threading

from warabi._core import syscalls
from warabi.shm.memory import SharedMemory


class LifeSign:
    """A word in shared memory that tells whether the thread that created it still runs.

    Attributes:
        memory: to be mapped by other processes.
        offset: of the word, four bytes in native order.
        value: the word's value while the thread lives.

    Raises:
        OSError: robust mutexes are not available.
    """

    def __init__(self) -> None:
        # The mutex contains pointers of the C library: others may map it only for reading.
        self.memory = SharedMemory("warabi-life", mmap.PAGESIZE, mine=True)
        self.value = threading.get_native_id()
        try:
            syscalls.mutex_lock(self.memory.address)
            with self.memory.view.cast("I") as words:
                # Where the C library stores the owner is not specified; the kernel's word contains
                # the ID of the thread that holds the mutex, and precedes any copy of it.
                self.offset = 4 * words.tolist()[:4].index(self.value)
        except ValueError:
            self.memory.close()
            raise OSError(errno.EOPNOTSUPP, "the layout of mutexes is unknown") from None
        except OSError:
            self.memory.close()
            raise

    def close(self) -> None:
        """Signal the end; must be called by the thread that created it."""
        syscalls.mutex_unlock(self.memory.address)
        self.memory.close()


class LifeSigns:
    """The liveness word of one thread, shared by its users; for that thread alone."""

    def __init__(self) -> None:
        self._sign: LifeSign | None = None
        self._users = 0

    def take(self) -> LifeSign:
        """Return the word, to be released with :meth:`drop`; raises as :class:`LifeSign`."""
        if self._sign is None:
            self._sign = LifeSign()
        self._users += 1
        return self._sign

    def drop(self) -> None:
        self._users -= 1
        if not self._users:
            self.close()

    def close(self) -> None:
        """Signal the end of the thread, even if the word has users."""
        if self._sign is not None:
            self._sign.close()
            self._sign = None
