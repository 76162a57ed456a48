"""Forms of values in messages: what an argument or a result has to be, checked before it is used.

A peer may send anything that msgpack can say.  Each argument and each result of an operation has a
:class:`Form`; what does not have it is refused here, at the edge, so that the code behind need not
expect a string where a number belongs.  Whether a number makes sense for a target (a size, an
offset, a mode) is the target's to say.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from warabi._core.attributes import Attributes
from warabi._core.results import OpenedInode, RegionStat, Verified
from warabi.errors import ProtocolError
from warabi.region import RegionID

_NoneType = type(None)
_SHOWN = 32  # characters of a value in a message
_LOWEST, _HIGHEST = -(1 << 63), (1 << 63) - 1
_check_attributes = struct.Struct("<QQqQqqQQqqq").pack
"""Refuses what is not as many numbers, or out of range, in one call."""


class Malformed(ValueError):
    """A value has not the form that it must have; the message says which form that is."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a value must be like.

    Attributes:
        what: the form in words, for messages.
        types: the exact types that msgpack gives such a value.  Integers must fit in 64 bits,
            signed, too.
        convert: turns a value of one of these types into what the operation takes or returns;
            raises ``TypeError``, ``ValueError`` or ``struct.error`` if something within it is
            wrong.  None: it is used as it is.
    """

    what: str
    types: tuple[type, ...]
    convert: Callable[[Any], Any] | None = None

    def decode(self, value: Any) -> Any:
        """*value* from a message, as an operation takes or returns it.

        Raises:
            Malformed: it has another form.
        """
        kind = type(value)
        if kind not in self.types:
            self._refuse(value)
        if kind is int and not _LOWEST <= value <= _HIGHEST:
            raise Malformed(f"the number {value} is out of range")
        if self.convert is None:
            return value
        try:
            return self.convert(value)
        except (TypeError, ValueError, struct.error) as error:
            if type(error) is Malformed:
                raise
            self._refuse(value)

    def _refuse(self, value: Any) -> NoReturn:
        raise Malformed(f"expected {self.what}, got {shown(value)}")


def shown(value: Any) -> str:
    """*value*, which may be anything that a peer sent, for a message, however large it is."""
    if isinstance(value, list | dict | tuple):  # whose repr() may be nested too deeply
        return f"{type(value).__name__} of {len(value)} items"
    if isinstance(value, str | bytes) and len(value) > _SHOWN:
        return f"{value[:_SHOWN]!r}... of {len(value)}"
    return f"{value!r:.200}"


def list_of(item: Form) -> Form:
    """A list, each item of which has the form *item*."""
    decode = item.decode
    return Form(f"a list, each item {item.what}", (list,), lambda value: [*map(decode, value)])


def optional(form: Form) -> Form:
    """As *form*, or None."""
    convert = form.convert
    wrapped = None if convert is None else lambda value: None if value is None else convert(value)
    return Form(f"{form.what} or None", (*form.types, _NoneType), wrapped)


def record(what: str, items: Sequence[Form], make: Callable[[list[Any]], Any]) -> Form:
    """A list of exactly *items*, given to *make*."""
    decoders = [item.decode for item in items]

    def convert(value: list[Any]) -> Any:
        return make([decode(item) for decode, item in zip(decoders, value, strict=True)])

    return Form(what, (list,), convert)


def _attributes(value: list[Any]) -> Attributes:
    _check_attributes(*value)
    return Attributes._make(value)


def _entries(value: list[Any]) -> list[tuple[bytes, Attributes]]:
    found = []
    for name, attributes in value:
        if type(name) is not bytes or type(attributes) is not list:
            raise TypeError
        found.append((name, _attributes(attributes)))
    return found


def _made(value: list[Any]) -> list[Any]:
    region, *granted = value
    return [REGION.decode(region), *(GRANTED.decode(granted) if granted else ())]


NOTHING = Form("None", (_NoneType,))
INTEGER = Form("an integer", (int,))
OPTIONAL_INTEGER = optional(INTEGER)
FLAG = Form("a truth value", (bool,))
BYTES = Form("bytes", (bytes,))
TEXT = Form("text", (str,))
REGION = Form("a region ID of 16 bytes", (bytes,), RegionID)
ATTRIBUTES = Form("an inode's attributes", (list,), _attributes)
ENTRIES = Form("a list of names with attributes", (list,), _entries)
REGION_STAT = record(
    "a region's size, times and names",
    (INTEGER, INTEGER, INTEGER, INTEGER, list_of(TEXT)),
    RegionStat._make,
)
STATS = list_of(record("a region with its size, times and names", (REGION, REGION_STAT), tuple))
OPENED = record("attributes and a version", (ATTRIBUTES, INTEGER), OpenedInode._make)
VERIFIED = record("counts of blocks", (INTEGER, INTEGER, list_of(INTEGER)), Verified._make)

_NUMBER = Form("a number", (int, bool))
JOINED = record("where the provider's liveness is seen", (INTEGER, INTEGER, FLAG), tuple)
GRANTED = record(
    "a grant",
    (INTEGER, INTEGER, INTEGER, OPTIONAL_INTEGER, INTEGER, _NUMBER, _NUMBER, _NUMBER),
    tuple,
)
MADE = Form("a new region and perhaps its grant", (list,), _made)


def numbers(what: str, count: int) -> Form:
    """*count* integers, as a tuple."""
    return record(what, (INTEGER,) * count, tuple)


def checked_arguments(name: str, forms: Sequence[Form], arguments: Any) -> list[Any]:
    """The arguments of the operation *name* from a message, converted.

    Raises:
        ProtocolError: they are not as many, or have not the forms, that *forms* say.
    """
    if not isinstance(arguments, list) or len(arguments) != len(forms):
        raise ProtocolError(f"{name}: expected {len(forms)} arguments")
    checked = arguments.copy()
    try:
        for index, form in enumerate(forms):  # Form.decode(), without a call where it is simple
            value = arguments[index]
            if form.convert is None and type(value) in form.types and type(value) is not int:
                continue
            checked[index] = form.decode(value)
    except Malformed as error:
        raise ProtocolError(f"{name}: argument {index + 1}: {error}") from None
    return checked
