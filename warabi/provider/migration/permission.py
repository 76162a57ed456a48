"""Permissions of peers to request, send and receive migrations.

The program that owns a provider may send its target anywhere.  Over a connection, a process of
the same user on the same host (``na+sm``) has the permissions of that user: to request that a
provider sends its target, to send one, and to choose where its files are stored.  Any other peer
has only the permissions in ``migration`` of the provider's configuration:

* ``send``: request that this provider sends its target to an address that the peer names, and
  removes it here.
* ``receive``: send a target to this provider, while it has none.
* ``root``: the directory that must contain the files of every received target, whatever the sender.
  Without it network peers may send targets in memory only.
"""

from __future__ import annotations

import os
from pathlib import Path

from warabi.errors import PermissionDenied
from warabi.target.config import MigrationConfig, ProviderConfig


def _allowed(config: ProviderConfig) -> MigrationConfig:
    return config.migration or MigrationConfig()


def check_send(config: ProviderConfig, provider_id: int, local: bool) -> None:
    """Check that a peer, *local* or not, may request that a provider sends its target."""
    if not (local or _allowed(config).send):
        raise PermissionDenied(
            f"migrate: provider {provider_id} does not send its target for peers over the network;"
            " set $.migration.send in its configuration to allow it"
        )


def check_receive(config: ProviderConfig, provider_id: int, local: bool) -> None:
    """Check that a peer, *local* or not, may send a target to a provider."""
    if not (local or _allowed(config).receive):
        raise PermissionDenied(
            f"migrate: provider {provider_id} does not receive targets from peers over the network;"
            " set $.migration.receive in its configuration to allow it"
        )


def place(config: ProviderConfig, path: str, local: bool) -> Path:
    """Return the path for a target that a peer requests at *path*, symbolic links resolved.

    With a ``root``, a relative *path* is relative to it.

    Raises:
        PermissionDenied: the peer may not use it.
    """
    root = _allowed(config).root
    if root is None:
        if not local:
            raise PermissionDenied(
                f"migrate: {path}: peers over the network may give a path only if the provider's"
                " configuration has $.migration.root"
            )
        return Path(os.path.realpath(path))
    top = os.path.realpath(root)
    found = os.path.realpath(os.path.join(top, path))
    if os.path.commonpath((top, found)) != top or found == top:
        raise PermissionDenied(f"migrate: {path}: is not inside {root}, the $.migration.root")
    return Path(found)
