"""Whether the thread that made shared memory is still alive.

``LifeSign`` is a word that changes when its owner's thread ends, however it ends: a robust mutex
(pthread_mutexattr_setrobust(3)) that the thread holds.  The kernel itself marks the word, also
after SIGKILL, before the process can be waited for.
"""

from __future__ import annotations

import errno
import mmap
import threading

from warabi._core import syscalls
from warabi.shm.memory import SharedMemory


class LifeSign:
    """A word in shared memory that tells whether the thread that made it still runs.

    Attributes:
        memory: what others map.
        offset: of the word, four bytes in native order.
        value: what the word is while the thread lives.

    Raises:
        OSError: the system's threads have no such word.
    """

    def __init__(self) -> None:
        # The mutex has pointers of the C library: others may read it, and never write.
        self.memory = SharedMemory("warabi-life", mmap.PAGESIZE, mine=True)
        self.value = threading.get_native_id()
        try:
            syscalls.mutex_lock(self.memory.address)
            with self.memory.view.cast("I") as words:
                # Where the C library keeps the owner is its own affair; the kernel's word is the
                # one that says which thread holds the mutex, and comes before any copy of it.
                self.offset = 4 * words.tolist()[:4].index(self.value)
        except ValueError:
            self.memory.close()
            raise OSError(errno.EOPNOTSUPP, "the layout of mutexes is unknown") from None
        except OSError:
            self.memory.close()
            raise

    def close(self) -> None:
        """Say that the end has come; by the thread that made it."""
        syscalls.mutex_unlock(self.memory.address)
        self.memory.close()


class LifeSigns:
    """The life sign of one thread, there while somebody needs it; for that thread alone."""

    def __init__(self) -> None:
        self._sign: LifeSign | None = None
        self._users = 0

    def take(self) -> LifeSign:
        """The sign, to be given back with :meth:`drop`; raises as :class:`LifeSign`."""
        if self._sign is None:
            self._sign = LifeSign()
        self._users += 1
        return self._sign

    def drop(self) -> None:
        self._users -= 1
        if not self._users:
            self.close()

    def close(self) -> None:
        """Say that the thread ends, whoever needs the sign."""
        if self._sign is not None:
            self._sign.close()
            self._sign = None
