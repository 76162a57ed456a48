"""The handshake of a connection, without I/O: authentication of both sides.

Both sides send their opening message (``wire.opening``) at once.  Without a token that is all.
With one, both openings contain a nonce; the client then proves that it knows the token, and only
then the provider does::

    client:    ["prove", HMAC-SHA256(token, "client" + both openings)]
    provider:  ["proved", HMAC-SHA256(token, "provider" + both openings)]

or the provider sends ``[0, nil, nil, failure]`` and closes the connection.  The token itself is
never sent, and the nonces make every proof valid for one connection only.

Both functions are generators that do no I/O: they yield bytes to be sent, possibly none, and are
then sent the next event from the peer.  Their return value is in ``StopIteration.value``; an
exception ends the connection.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

from warabi import errors
from warabi.errors import PermissionDenied, ProtocolError
from warabi.protocol import wire
from warabi.protocol.auth import Peer, Security
from warabi.protocol.forms import shown
from warabi.protocol.wire import Limits, Message, OpeningReceived

_NONCE = 32
STRANGER = Limits(header=4096, payload=0, requests=1)
"""What a provider accepts from an unauthenticated peer; its opening announces larger limits."""


def proof(token: bytes, side: str, client: bytes, provider: bytes) -> bytes:
    """Return the proof that *side* knows *token*, for the connection with these two openings."""
    import hmac

    # An opening contains its own length, so the concatenation of two is unambiguous.
    return hmac.digest(token, b"warabi " + side.encode() + b"\n" + client + provider, "sha256")


def _proves(token: bytes, side: str, client: bytes, provider: bytes, shown: Any) -> bool:
    import hmac

    return isinstance(shown, bytes) and hmac.compare_digest(
        shown, proof(token, side, client, provider)
    )


def _opening(limits: Limits, nonce: bool, read_only: bool = False) -> bytes:
    more: dict[str, Any] = {}
    if nonce:
        more["nonce"] = os.urandom(_NONCE)
    if read_only:
        more["read_only"] = True
    return wire.opening(limits, more)


def _has_nonce(opened: OpeningReceived) -> bool:
    nonce = opened.content.get("nonce")
    return isinstance(nonce, bytes) and len(nonce) == _NONCE


def client(
    limits: Limits, security: Security, *, local: bool, read_only: bool
) -> Generator[bytes, wire.Event, Limits]:
    """Run the client's side; returns the provider's limits.

    Args:
        limits: what this side accepts.
        security: contains the token that this side presents, and requires of the provider, too.
        local: whether the peer is known to be this user's process; then it need not prove itself.
        read_only: request read-only access.

    Raises:
        PermissionDenied: the provider refuses this side, or does not know the token.
        ProtocolError: it violated the protocol.
    """
    token = security.own_token
    own = _opening(limits, bool(token), read_only)
    opened = yield own
    if not isinstance(opened, OpeningReceived):
        raise ProtocolError("no handshake")
    if "nonce" not in opened.content:
        if token and not local:
            raise PermissionDenied(
                "a token is configured, but the engine does not use one: it may be the wrong engine"
            )
        return opened.limits
    if not token:
        raise PermissionDenied("the engine requires a token, and none is configured")
    if not _has_nonce(opened):
        raise ProtocolError("a handshake with a malformed nonce")
    reply = yield wire.frame(["prove", proof(token, "client", own, opened.raw)])
    header = reply.header if isinstance(reply, Message) and not reply.payload else None
    if refusal := refused(header):
        raise refusal
    if not isinstance(header, list) or len(header) != 2 or header[0] != "proved":
        raise ProtocolError("no reply to the token")
    if not _proves(token, "provider", own, opened.raw, header[1]):
        raise PermissionDenied("the engine rejected the token")
    return opened.limits


def provider(
    limits: Limits, security: Security, *, local: bool
) -> Generator[bytes, wire.Event, tuple[Limits, Peer, bytes]]:
    """Run the provider's side; returns the client's limits, its properties, and the last bytes to
    send.

    Args:
        limits: what this side accepts after authentication.
        security: what it requires.
        local: whether the client is a process of this user, or of root, on this host.

    Raises:
        PermissionDenied: the client has no token, or a wrong one.
        ProtocolError: it violated the protocol.
    """
    tokens = security.tokens
    own = _opening(limits, bool(tokens))
    opened = yield own
    if not isinstance(opened, OpeningReceived):
        raise ProtocolError("no handshake")
    read_only = bool(opened.content.get("read_only"))
    answer = b""
    if tokens:
        if not _has_nonce(opened):
            raise PermissionDenied("this engine requires a token, and the client has none")
        message = yield b""
        header = message.header if isinstance(message, Message) and not message.payload else None
        if not isinstance(header, list) or len(header) != 2 or header[0] != "prove":
            raise PermissionDenied("this engine requires a token first")
        for token, only_reads in tokens:
            if _proves(token, "client", opened.raw, own, header[1]):
                read_only |= only_reads
                break
        else:
            raise PermissionDenied("the client's token is wrong")
        answer = wire.frame(["proved", proof(token, "provider", opened.raw, own)])
    return opened.limits, Peer(local, read_only), answer


def refused(header: Any) -> errors.Exception | None:
    """Return why the provider ends the connection, if *header* is such a message; else None."""
    if not isinstance(header, list) or len(header) != 4 or header[0] != 0:
        return None
    failure = header[3] if isinstance(header[3], list) and header[3] else [None]
    kinds = {"denied": PermissionDenied, "connect": errors.ConnectionFailed}
    kind = kinds.get(failure[0], ProtocolError) if isinstance(failure[0], str) else ProtocolError
    said = failure[1] if len(failure) > 1 and isinstance(failure[1], str) else shown(failure)
    return kind(f"the engine refused the connection: {said:.300}")
