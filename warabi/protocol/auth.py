"""Who may reach an engine, and do what there: certificates, tokens, and the one question.

An engine's configuration says what it demands of its peers and what it shows them
(:class:`Security`).  What a connection's peer turned out to be is a :class:`Peer`, and everything
that is asked of a provider goes through :func:`permit`.
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
from warabi.errors import ConfigError, PermissionDenied

if TYPE_CHECKING:
    import ssl  # takes time to import, which those without TLS need not

SHORTEST_TOKEN = 16
"""Bytes of a token: who listens may try shorter ones out, without anybody noticing."""
_LONGEST_TOKEN = 4096
_WHERE = "engine configuration: $"
KEYS = ("insecure", "tls", "token", "token_file", "read_only_token", "read_only_token_file")
"""The keys of an engine's configuration that are read here."""


class RequiredAccess(enum.Enum):
    """What carrying out an operation takes.

    ``READ``: nothing but being let in.  Making durable what others wrote is no change.
    ``CHANGE``: a peer that is not read-only.
    """

    READ = enum.auto()
    CHANGE = enum.auto()


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a connection, as far as that is proven.

    Attributes:
        local: a process of this user, or of root, on this host.
        read_only: it showed the token of those who only read, or asked for no more.
    """

    local: bool = False
    read_only: bool = False


def permit(peer: Peer, name: str, access: RequiredAccess) -> None:
    """Return if *peer* may carry out the operation *name*, which takes *access*.

    Raises:
        PermissionDenied: it may not.
    """
    if access is RequiredAccess.READ:
        return
    if peer.read_only:
        raise PermissionDenied(f"{name}: access is read-only")


@dataclass(frozen=True)
class TlsFiles:
    """A side's certificate and key, and the authority that signed everybody's; in PEM.

    Attributes:
        server_name: the name that a server's certificate must have; empty for the host
            name, or IP address, that a client connects to.
    """

    certificate: str
    key: str
    ca: str
    server_name: str = ""

    @cached_property
    def server(self) -> ssl.SSLContext:
        """For those who accept connections: clients must have a certificate, too."""
        import ssl

        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0  # nobody resumes
        return context

    @cached_property
    def client(self) -> ssl.SSLContext:
        """For those who connect; the server's certificate must have its name."""
        import ssl

        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, protocol: int) -> ssl.SSLContext:
        import ssl

        _refuse_others(self.key, "tls.key")
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            # A key with a password would ask for it on the terminal.
            context.load_cert_chain(self.certificate, self.key, password="")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{_WHERE}.tls: certificate {self.certificate}, key {self.key}: {_why(error)}"
            ) from None
        try:
            context.load_verify_locations(self.ca)
        except OSError as error:
            raise ConfigError(f"{_WHERE}.tls.ca: {self.ca}: {_why(error)}") from None
        return context


@dataclass(frozen=True)
class Security:
    """What an engine demands of its peers and shows them.

    Attributes:
        insecure: listen beyond loopback even without the rest.
        token: whoever has it may do everything.
        read_only_token: whoever has it may read.
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
        """The tokens that open the way in, and whether only to reading."""
        both = [(self.token, False), (self.read_only_token, True)]
        return [(token, read_only) for token, read_only in both if token]

    @property
    def own_token(self) -> bytes:
        """What this side shows when it is the one that connects; empty for none."""
        return self.token or self.read_only_token


_TLS_OPTIONS = {
    "tls_cert": "certificate", "tls_key": "key", "tls_ca": "ca", "tls_name": "server_name",
}  # fmt: skip


def config_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """An engine's configuration from a command line's options; those not given are None or False.

    An empty one was given, by a script with a variable that is not set perhaps, and is refused.
    """
    given = {name: value for name, value in options.items() if value not in (None, False)}
    tls = {key: given.pop(name) for name, key in _TLS_OPTIONS.items() if name in given}
    return {**given, "tls": tls} if tls else given


def from_config(config: dict[str, Any]) -> Security:
    """What an engine's *config* says of these matters, its files read.

    Raises:
        ConfigError: something is missing, contradictory, of the wrong type, or cannot be read.
        PermissionDenied: a file with a secret is open to every user.
    """
    insecure = config.get("insecure", False)
    if not isinstance(insecure, bool):
        raise ConfigError(f"{_WHERE}.insecure: {insecure!r} is neither true nor false")
    token = _token(config, "token")
    read_only_token = _token(config, "read_only_token")
    if token and token == read_only_token:
        raise ConfigError(f"{_WHERE}.read_only_token: is the same as the other token")
    return Security(_tls(config), token, read_only_token, insecure)


def _tls(config: dict[str, Any]) -> TlsFiles | None:
    if "tls" not in config:
        return None
    section = config["tls"]
    if not isinstance(section, dict):
        raise ConfigError(f"{_WHERE}.tls: expected an object")
    known = ("certificate", "key", "ca", "server_name")
    for key in section:
        if key not in known:
            raise ConfigError(f"{_WHERE}.tls.{key}: {config_keys.unknown(key, known)}")
    for key in known:
        value = section.get(key, "" if key == "server_name" else None)
        if isinstance(value, os.PathLike):
            continue
        if not isinstance(value, str) or not (value or key == "server_name"):
            what = "required key is missing" if value is None else f"{value!r:.60} is no path"
            raise ConfigError(f"{_WHERE}.tls.{key}: {what}")
    found = TlsFiles(**{key: os.fspath(value) for key, value in section.items()})
    assert found.client  # what is wrong with the files is said now
    return found


def _token(config: dict[str, Any], key: str) -> bytes:
    # A key whose value is None was meant to protect something: it is no key that is missing.
    if key in config and f"{key}_file" in config:
        raise ConfigError(f"{_WHERE}.{key}: is given, and so is {key}_file")
    if f"{key}_file" in config:
        where, path = f"{_WHERE}.{key}_file", config[f"{key}_file"]
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            raise ConfigError(f"{where}: {path!r:.60} is no path")
        _refuse_others(path, f"{key}_file")
        try:
            with open(path, "rb") as file:
                token = file.read(_LONGEST_TOKEN + 1).strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{where}: {os.fspath(path)}: {_why(error)}") from None
    elif key not in config:
        return b""
    else:
        where, text = f"{_WHERE}.{key}", config[key]
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
    """Refuse a file with a secret that every user may read or change."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError) as error:
        raise ConfigError(f"{_WHERE}.{key}: {os.fspath(path)}: {_why(error)}") from None
    if stat.S_IMODE(mode) & 0o007:
        raise PermissionDenied(
            f"{_WHERE}.{key}: {os.fspath(path)} is open to every user (mode"
            f" {stat.S_IMODE(mode):04o}); chmod 600 makes it secret"
        )


def _why(error: Exception) -> str:
    """Of errors of the system and of OpenSSL alike."""
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
