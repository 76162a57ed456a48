"""The opening of a connection, without I/O: who is there, and may they come in?

Both sides send their opening (``wire.opening``) at once.  Without a token that is all.  With one,
both openings contain a nonce; the client then proves that it knows the token, and only then
the provider does::

    client:    ["prove", HMAC-SHA256(token, "client" + both openings)]
    provider:  ["proved", HMAC-SHA256(token, "provider" + both openings)]

or ``[0, nil, nil, failure]``, and the end.  The token itself is never sent, and the nonces make
every proof good for one connection only.

Both functions are generators that do no I/O: they yield bytes to be sent, possibly none, and are
then sent the next event from the peer.  What they return is in ``StopIteration.value``; what they
raise ends the connection.
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
"""What a provider takes from a peer that has not been let in yet; its opening does not say so."""


def proof(token: bytes, side: str, client: bytes, provider: bytes) -> bytes:
    """What shows that *side* knows *token*, on the connection with these two openings."""
    import hmac

    # An opening says how long it is, so two of them in a row can be taken apart in one way only.
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
    """A client's part; returns what the provider is ready to receive.

    Args:
        limits: what this side is ready to receive.
        security: whose token this side shows, and demands of the provider, too.
        local: whether the peer is known to be this user's already; it then need not prove itself.
        read_only: ask to be treated as one who only reads.

    Raises:
        PermissionDenied: the provider does not let this side in, or is not who it should be.
        ProtocolError: it broke a rule.
    """
    token = security.own_token
    own = _opening(limits, bool(token), read_only)
    opened = yield own
    if not isinstance(opened, OpeningReceived):
        raise ProtocolError("no opening")
    if "nonce" not in opened.content:
        if token and not local:
            raise PermissionDenied(
                "the engine asks for no token, but this side has one: it may not be the right one"
            )
        return opened.limits
    if not token:
        raise PermissionDenied("the engine asks for a token, and this side has none")
    if not _has_nonce(opened):
        raise ProtocolError("an opening with a malformed nonce")
    reply = yield wire.frame(["prove", proof(token, "client", own, opened.raw)])
    header = reply.header if isinstance(reply, Message) and not reply.payload else None
    if refusal := refused(header):
        raise refusal
    if not isinstance(header, list) or len(header) != 2 or header[0] != "proved":
        raise ProtocolError("no answer to the token")
    if not _proves(token, "provider", own, opened.raw, header[1]):
        raise PermissionDenied("the engine does not know the token: it is not the right one")
    return opened.limits


def provider(
    limits: Limits, security: Security, *, local: bool
) -> Generator[bytes, wire.Event, tuple[Limits, Peer, bytes]]:
    """A provider's part; returns what the client is ready to receive, who it is, and the last
    bytes to be sent.

    Args:
        limits: what this side is ready to receive once it has let the client in.
        security: what it demands.
        local: whether the client is a process of this user, or of root, on this host.

    Raises:
        PermissionDenied: the client has no token, or a wrong one.
        ProtocolError: it broke a rule.
    """
    tokens = security.tokens
    own = _opening(limits, bool(tokens))
    opened = yield own
    if not isinstance(opened, OpeningReceived):
        raise ProtocolError("no opening")
    read_only = bool(opened.content.get("read_only"))
    answer = b""
    if tokens:
        if not _has_nonce(opened):
            raise PermissionDenied("this engine asks for a token, and the client has none")
        message = yield b""
        header = message.header if isinstance(message, Message) and not message.payload else None
        if not isinstance(header, list) or len(header) != 2 or header[0] != "prove":
            raise PermissionDenied("this engine asks for a token before anything else")
        for token, only_reads in tokens:
            if _proves(token, "client", opened.raw, own, header[1]):
                read_only |= only_reads
                break
        else:
            raise PermissionDenied("the client's token is not this engine's")
        answer = wire.frame(["proved", proof(token, "provider", opened.raw, own)])
    return opened.limits, Peer(local, read_only), answer


def refused(header: Any) -> errors.Exception | None:
    """Why the provider ends the connection, if that is what a reply says."""
    if not isinstance(header, list) or len(header) != 4 or header[0] != 0:
        return None
    failure = header[3] if isinstance(header[3], list) and header[3] else [None]
    kinds = {"denied": PermissionDenied, "connect": errors.ConnectionFailed}
    kind = kinds.get(failure[0], ProtocolError) if isinstance(failure[0], str) else ProtocolError
    said = failure[1] if len(failure) > 1 and isinstance(failure[1], str) else shown(failure)
    return kind(f"the engine refused the connection: {said:.300}")
