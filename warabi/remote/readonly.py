"""Read-only links: operations that change anything are refused before they are sent.

The provider refuses them, too; this reports the error earlier, and also protects a target in the
caller's own process, which has no connection.  Blocking and asynchronous links are restricted in
the same way, since a refusal does not wait.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar, cast

from warabi.protocol.auth import Peer, permit
from warabi.protocol.operations import access
from warabi.shm.client import NO_ACCESS

_READER = Peer(read_only=True)
_READING = frozenset(
    "reading eager_read eager_write size read_into read_some read_vector changes persist"
    " start_read finish undo poll".split()
)
"""What a reader may use of the links' interfaces.  Every other method is refused."""

AnyLink = TypeVar("AnyLink")


def _refuse_change(name: str, *_: object) -> None:
    """Raise ``PermissionDenied`` unless the operation *name* only reads."""
    permit(_READER, name, access(name))


class ReadOnlyLink:
    """Restricts *link* to operations that only read."""

    writing = NO_ACCESS

    def __init__(self, link: Any) -> None:
        self.link: Any
        object.__setattr__(self, "link", link)

    def __getattr__(self, name: str) -> Any:
        if name in _READING:
            return getattr(self.link, name)
        if name.startswith("_") or not hasattr(self.link, name):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return functools.partial(_refuse_change, name.removeprefix("start_"))

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.link, name, value)  # the thresholds of eager data

    def call(self, name: str, *arguments: Any) -> Any:
        """See the interfaces of links; so for :meth:`start`."""
        _refuse_change(name)
        return self.link.call(name, *arguments)

    def start(self, name: str, *arguments: Any) -> Any:
        _refuse_change(name)
        return self.link.start(name, *arguments)


def restricted(link: AnyLink) -> AnyLink:
    """Return *link* without the operations that change a target."""
    return cast(AnyLink, ReadOnlyLink(link))
