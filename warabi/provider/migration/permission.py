"""Who may migrate what: the one place where it is decided.

The program that owns a provider may send its target anywhere.  Over a connection, a process of
the same user on the same host (``na+sm``) may do what that user may: ask a provider to send its
target, bring one, and say where its files go.  Anybody else may only what the provider's
configuration has in ``migration``:

* ``send``: ask this provider to send its target away, to an address that the peer names, and to
  remove it here.
* ``receive``: bring this provider, while it has none, a target.
* ``root``: the directory in which the files of every target that is brought must be, whoever
  brings it.  Without it a network peer may bring targets in memory only.
"""

from __future__ import annotations

import os
from pathlib import Path

from warabi.errors import PermissionDenied
from warabi.target.config import MigrationConfig, ProviderConfig


def _allowed(config: ProviderConfig) -> MigrationConfig:
    return config.migration or MigrationConfig()


def check_send(config: ProviderConfig, provider_id: int, local: bool) -> None:
    """Whether a peer, *local* or not, may have a provider send its target away."""
    if not (local or _allowed(config).send):
        raise PermissionDenied(
            f"migrate: provider {provider_id} does not send its target for peers over the network;"
            " set $.migration.send in its configuration to allow it"
        )


def check_receive(config: ProviderConfig, provider_id: int, local: bool) -> None:
    """Whether a peer, *local* or not, may bring a provider a target."""
    if not (local or _allowed(config).receive):
        raise PermissionDenied(
            f"migrate: provider {provider_id} does not receive targets from peers over the network;"
            " set $.migration.receive in its configuration to allow it"
        )


def place(config: ProviderConfig, path: str, local: bool) -> Path:
    """Where a target's files may be that a peer wants at *path*, symbolic links resolved.

    With a ``root``, a relative *path* is relative to it.

    Raises:
        PermissionDenied: not there.
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
