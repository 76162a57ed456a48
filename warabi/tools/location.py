"""Where a word of a command line leads: into a target, or to the local disk.

na+sm://1234-0               the target of provider 0 (or of the option -p) of an engine
na+sm://1234-0/7/dir/file    provider 7, and a path in its target
warabi://host:port/7/dir     the same over TCP, as for fsspec; warabi://na+sm:1234-0/7/dir
/mnt/dir/file                a path on a mount of a target that an engine serves
data/target/dir/file         a target in files, and a path in it; also file:data/target
rados:pool/name              a target in a pool of a Ceph cluster; rados:pool/name/dir/file
:/dir/file                   a path in the target that the variable WARABI_ADDRESS names
"""

from __future__ import annotations

import os
import posixpath
import re
from dataclasses import dataclass, replace

from warabi.errors import ConfigError
from warabi.mounted import mounted_path

VARIABLE = "WARABI_ADDRESS"
_SERVED = re.compile(r"([a-z][a-z0-9+;_]*)://([^/]*)(?:/(\d+))?(/.*)?", re.DOTALL)
_POOLED = "rados:"
_EMBEDDED = ("file:", "warabi+file://", "warabi://")  # the last one before a path


@dataclass(frozen=True)
class Location:
    """A path in a target, or on the local disk.

    Attributes:
        text: as it was written.
        path: in the target, or on the local disk; "" if only a target is named.
        address: of the engine that serves the target.
        provider_id: of its provider.
        file: the path of a target that no engine serves, or ``rados:POOL/NAME``.
    """

    text: str
    path: str = ""
    address: str = ""
    provider_id: int = 0
    file: str = ""

    @property
    def local(self) -> bool:
        """Whether it is a path on the local disk."""
        return not self.address and not self.file

    @property
    def pooled(self) -> bool:
        """Whether the target is in a pool of a cluster."""
        return self.file.startswith(_POOLED)

    @property
    def target(self) -> tuple[str, int, str]:
        """What names the target: the same for all paths in it."""
        file = self.file
        if file and not self.pooled:
            file = os.path.realpath(file)
        return self.address, self.provider_id, file

    def in_target(self) -> Location:
        """Take a path on the local disk for that of a target."""
        return replace(self, file=self.path, path="") if self.local else self

    def below(self, name: str) -> Location:
        """The entry *name* of this directory."""
        shown = posixpath.join(self.text, name)
        return replace(self, text=shown, path=posixpath.join(self.path or "/", name))


def parse(text: str, provider_id: int = 0) -> Location:
    """Find out where *text* leads; *provider_id* counts where it names none.

    A path that exists and is a regular file leads to the local disk; one that goes on behind a
    regular file leads into the target that this is.

    Raises:
        ConfigError: it is malformed, on a mount that no engine serves, or needs the variable.
        OSError: a directory on a mount cannot be accessed.
    """
    if text.startswith(":"):
        default = os.environ.get(VARIABLE, "")
        if not default:
            raise ConfigError(
                f"no target is named, and the variable {VARIABLE} is not set: set it to an"
                " engine's address, or to the path of a target"
            )
        found = parse(default, provider_id).in_target()
        path = posixpath.join(found.path or "/", text[1:].lstrip("/")) if text[1:] else found.path
        return replace(found, text=text if text[1:] else default, path=path)
    if text.startswith(_POOLED):
        pool, _, rest = text.partition("/")
        name, _, inside = rest.partition("/")
        return Location(text, f"/{inside.strip('/')}" if inside else "", file=f"{pool}/{name}")
    kind, colon, rest = text.partition("://")
    if text.startswith(_EMBEDDED) and (not colon or rest.startswith("/") or kind != "warabi"):
        return _embedded(text, rest if colon else text.removeprefix("file:"))
    if colon:
        return _served(text, provider_id)
    return _on_disk(text)


def _served(text: str, provider_id: int) -> Location:
    match = _SERVED.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text}: expected SCHEME://ENGINE/PROVIDER/PATH")
    scheme, engine, number, path = match.groups()
    if number is None and path not in (None, "/"):
        raise ConfigError(
            f"{text}: expected the number of a provider before the path, as in"
            f" {scheme}://{engine}/{provider_id}{path}"
        )
    if scheme == "warabi":
        local = engine.startswith("na+sm:")
        scheme, engine = ("na+sm", engine[6:]) if local else ("ofi+tcp", engine)
    provider_id = provider_id if number is None else int(number)
    return Location(text, path or "", f"{scheme}://{engine}", provider_id)


def _embedded(text: str, path: str) -> Location:
    found = _behind_file(text, path)
    return found or Location(text, file=path)


def _behind_file(text: str, path: str) -> Location | None:
    """Return the location in a target if *path* goes on behind a regular file."""
    file = path
    while (above := file.rpartition("/")[0]) and not os.path.lexists(file):
        file = above
    if file.endswith("/"):
        file = file.rstrip("/")
    if file != path and os.path.isfile(file):
        return Location(text, "/" + path[len(file) :].strip("/"), file=file)
    return None


def _on_disk(text: str) -> Location:
    if found := mounted_path(text):
        return Location(text, found.path, found.address, found.provider_id)
    return _behind_file(text, text) or Location(text, text)
