"""Security of an engine: TLS certificates, tokens, and permissions.

An engine's configuration defines what it requires of its peers and what it presents to them
(:class:`Security`).  The proven properties of a connection's peer are a :class:`Peer`, and every
operation is checked with :func:`permit`.
"""

from __future__ import annotations

import enum
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from warabi._core import config_keys
from warabi._core.config_keys import ENGINE
from warabi.errors import ConfigError, PermissionDenied

if TYPE_CHECKING:
    import ssl  # slow to import, and not needed without TLS

SHORTEST_TOKEN = 16
"""Shortest token in bytes: shorter ones could be found by an offline search of a recorded
handshake."""
_LONGEST_TOKEN = 4096
KEYS = ("insecure", "tls", "token", "token_file", "read_only_token", "read_only_token_file")
"""The keys of an engine's configuration that this module reads."""
TLS_REQUIRED = ("certificate", "key", "ca")
"""The keys of ``tls`` that have to be there; they are paths."""


class RequiredAccess(enum.Enum):
    """The access that an operation requires.

    ``READ``: any peer.  Making data durable that others wrote is not a change.
    ``CHANGE``: a peer that is not read-only.
    """

    READ = enum.auto()
    CHANGE = enum.auto()


@dataclass(frozen=True)
class Peer:
    """The proven properties of the peer of a connection.

    Attributes:
        local: a process of this user, or of root, on this host.
        read_only: it has the read-only token, or requested read-only access.
    """

    local: bool = False
    read_only: bool = False


def permit(peer: Peer, name: str, access: RequiredAccess) -> None:
    """Check that *peer* may carry out the operation *name*, which requires *access*.

    Raises:
        PermissionDenied: it may not.
    """
    if access is RequiredAccess.READ:
        return
    if peer.read_only:
        raise PermissionDenied(f"{name}: access is read-only")


@dataclass(frozen=True)
class TlsFiles:
    """A side's certificate and key, and the CA that signed the certificates of both sides; PEM
    files.

    Attributes:
        server_name: the name that the server's certificate must have; empty for the host
            name, or IP address, that a client connects to.
    """

    certificate: str
    key: str
    ca: str
    server_name: str = ""

    @cached_property
    def server(self) -> ssl.SSLContext:
        """The context of the accepting side; clients must have a certificate, too."""
        import ssl

        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0  # no client resumes sessions
        return context

    @cached_property
    def client(self) -> ssl.SSLContext:
        """The context of the connecting side; the server's certificate must have its name."""
        import ssl

        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, protocol: int) -> ssl.SSLContext:
        import ssl

        _refuse_others(self.key, "tls.key")
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            # Without a password argument OpenSSL would ask for one on the terminal.
            context.load_cert_chain(self.certificate, self.key, password="")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{ENGINE}.tls: certificate {self.certificate}, key {self.key}: {_why(error)}"
            ) from None
        try:
            context.load_verify_locations(self.ca)
        except OSError as error:
            raise ConfigError(f"{ENGINE}.tls.ca: {self.ca}: {_why(error)}") from None
        return context


@dataclass(frozen=True)
class Security:
    """What an engine requires of its peers and presents to them.

    Attributes:
        insecure: listen beyond loopback even without TLS and tokens.
        token: grants full access.
        read_only_token: grants read-only access.
    """

    tls: TlsFiles | None = None
    token: bytes = field(default=b"", repr=False)
    read_only_token: bytes = field(default=b"", repr=False)
    insecure: bool = False

    @property
    def protected(self) -> bool:
        """Whether it may listen beyond loopback."""
        return self.insecure or self.tls is not None or bool(self.tokens)

    @property
    def tokens(self) -> list[tuple[bytes, bool]]:
        """The accepted tokens, and whether each grants only read access."""
        both = [(self.token, False), (self.read_only_token, True)]
        return [(token, read_only) for token, read_only in both if token]

    @property
    def own_token(self) -> bytes:
        """The token that this side presents when it connects; empty for none."""
        return self.token or self.read_only_token


_TLS_OPTIONS = {
    "tls_cert": "certificate", "tls_key": "key", "tls_ca": "ca", "tls_name": "server_name",
}  # fmt: skip


def config_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert command-line options to an engine's configuration; None and False mean "not given".

    An empty string counts as given, since it may come from an unset variable of a script; it is
    refused later.
    """
    given = {name: value for name, value in options.items() if value not in (None, False)}
    tls = {key: given.pop(name) for name, key in _TLS_OPTIONS.items() if name in given}
    return {**given, "tls": tls} if tls else given


def from_config(config: dict[str, Any]) -> Security:
    """Parse the security settings of an engine's *config*, and read the files.

    Raises:
        ConfigError: something is missing, contradictory, of the wrong type, or cannot be read.
        PermissionDenied: a file with a secret is accessible to every user.
    """
    insecure = config.get("insecure", False)
    if not isinstance(insecure, bool):
        raise ConfigError(f"{ENGINE}.insecure: {insecure!r} is neither true nor false")
    token = _token(config, "token")
    read_only_token = _token(config, "read_only_token")
    if token and token == read_only_token:
        raise ConfigError(f"{ENGINE}.read_only_token: is the same as $.token")
    return Security(_tls(config), token, read_only_token, insecure)


def _tls(config: dict[str, Any]) -> TlsFiles | None:
    if "tls" not in config:
        return None
    section = config["tls"]
    if not isinstance(section, dict):
        raise ConfigError(f"{ENGINE}.tls: expected an object")
    known = (*TLS_REQUIRED, "server_name")
    for key in section:
        if key not in known:
            raise ConfigError(f"{ENGINE}.tls.{key}: {config_keys.unknown(key, known)}")
    for key in known:
        value = section.get(key, "" if key == "server_name" else None)
        if isinstance(value, os.PathLike):
            continue
        if not isinstance(value, str) or not (value or key == "server_name"):
            what = "required key is missing" if value is None else f"{value!r:.60} is not a path"
            raise ConfigError(f"{ENGINE}.tls.{key}: {what}")
    found = TlsFiles(**{key: os.fspath(value) for key, value in section.items()})
    assert found.client  # report problems with the files now
    return found


def _token(config: dict[str, Any], key: str) -> bytes:
    # A key with the value None was meant to protect something, so it does not count as missing.
    if key in config and f"{key}_file" in config:
        raise ConfigError(f"{ENGINE}.{key}: cannot be combined with {key}_file")
    if f"{key}_file" in config:
        where, path = f"{ENGINE}.{key}_file", config[f"{key}_file"]
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            raise ConfigError(f"{where}: {path!r:.60} is not a path")
        _refuse_others(path, f"{key}_file")
        try:
            with open(path, "rb") as file:
                token = file.read(_LONGEST_TOKEN + 1).strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{where}: {os.fspath(path)}: {_why(error)}") from None
    elif key not in config:
        return b""
    else:
        where, text = f"{ENGINE}.{key}", config[key]
        if not isinstance(text, str):
            raise ConfigError(f"{where}: expected text")
        token = text.strip().encode("utf-8", "surrogatepass")
    if not SHORTEST_TOKEN <= len(token) <= _LONGEST_TOKEN:
        raise ConfigError(
            f"{where}: a token of {len(token)} bytes, expected {SHORTEST_TOKEN} to"
            f" {_LONGEST_TOKEN} (openssl rand -hex 32 makes one)"
        )
    return token


def _refuse_others(path: str | os.PathLike[str], key: str) -> None:
    """Raise if a file with a secret can be read or changed by every user."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError) as error:
        raise ConfigError(f"{ENGINE}.{key}: {os.fspath(path)}: {_why(error)}") from None
    if stat.S_IMODE(mode) & 0o007:
        raise PermissionDenied(
            f"{ENGINE}.{key}: {os.fspath(path)} is accessible to other users (mode"
            f" {stat.S_IMODE(mode):04o}); use chmod 600"
        )


def _why(error: Exception) -> str:
    """Return the reason of an error of the system or OpenSSL."""
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
