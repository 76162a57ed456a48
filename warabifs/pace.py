"""How the mount's loop waits for the kernel's next request.

pyfuse3 waits through Trio for each request: two turns of its loop, and three system calls
besides those that take the request and answer it, which is more than most requests cost.  It
looks Trio up as its global ``trio``, which its own ``pyfuse3.asyncio`` replaces as well; here
that becomes an object that has what pyfuse3 uses of Trio, with a lock and a wait that know what
they are for:

* A request that is there is taken without a turn of Trio's loop, and one that is not is waited
  for in the kernel, for a moment, while no other request is being served.
* Whoever reads the next request is woken only where Trio's loop gets a turn at all.

Other tasks wait no longer for that than ``_STREAK`` requests and moments.
"""

from __future__ import annotations

import select
from types import TracebackType

import pyfuse3
import trio

_MOMENT = 1
"""Milliseconds for which the loop may stand still when nothing is under way."""
_STREAK = 16
"""Requests that may be taken between two turns of Trio's loop."""


class Pace:
    """What pyfuse3 sees of Trio.

    Attributes:
        serving: requests that were taken and are not answered; whoever serves them counts.
    """

    ClosedResourceError = trio.ClosedResourceError
    open_nursery = staticmethod(trio.open_nursery)
    current_task = staticmethod(trio.lowlevel.current_task)
    current_trio_token = staticmethod(trio.lowlevel.current_trio_token)
    notify_closing = staticmethod(trio.lowlevel.notify_closing)

    def __init__(self) -> None:
        self.lowlevel = self
        self.serving = 0
        self._streak = 0
        self._poll: select.poll | None = None

    def Lock(self) -> Turn:  # noqa: N802  # its name in Trio
        return Turn()

    async def wait_readable(self, fd: int) -> None:
        """Return when a request, or the end of the session, can be read from *fd*."""
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(fd, select.POLLIN)
        if self._streak < _STREAK:
            self._streak += 1
            if self._poll.poll(0 if self.serving else _MOMENT):
                return
        self._streak = 0
        await trio.lowlevel.wait_readable(fd)


class Turn:
    """The lock of the task that reads the next request; the others are parked.

    Who leaves may come back before anybody else runs, and is then let in.
    """

    def __init__(self) -> None:
        self._taken = False
        self._waking = False  # one of the others is about to run
        self._parked = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        while self._taken:
            try:
                await self._parked.park()
            finally:
                self._waking = False
        self._taken = True

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._taken = False
        if self._parked and not self._waking:
            self._waking = True
            self._parked.unpark()


def install() -> Pace:
    """Have pyfuse3 wait in this way, in this process."""
    pace = Pace()
    pyfuse3.trio = pace  # type: ignore[attr-defined]  # not in its stub
    return pace
