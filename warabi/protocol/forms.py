"""Forms of values in messages: validation of arguments and results before use.

A peer may send any msgpack value.  Each argument and each result of an operation has a
:class:`Form`; a value that does not match is rejected here, so that the code behind need not
expect a string instead of a number.  Whether a number is valid for a target (a size, an offset, a
mode) is checked by the target.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from warabi._core.attributes import Attributes
from warabi._core.lock_ranges import FileLock
from warabi._core.results import OpenedInode, RegionStat, Verified
from warabi.errors import ProtocolError
from warabi.region import RegionID

_NoneType = type(None)
_SHOWN = 32  # most characters of a value in an error message
_LOWEST, _HIGHEST = -(1 << 63), (1 << 63) - 1
_check_attributes = struct.Struct("<QQqQqqQQqqqqqQ").pack
"""Rejects a wrong count of numbers, or numbers out of range, in one call."""


class Malformed(ValueError):
    """A value does not match its form; the message tells the expected form."""


@dataclass(frozen=True, slots=True)
class Form:
    """The type and conversion of a value.

    Attributes:
        what: a description for error messages.
        types: the exact types that msgpack decodes such a value to.  Integers must also fit in
            64 bits, signed.
        convert: converts a value of one of these types to what the operation takes or returns;
            raises ``TypeError``, ``ValueError`` or ``struct.error`` if the contents are invalid.
            None: no conversion.
    """

    what: str
    types: tuple[type, ...]
    convert: Callable[[Any], Any] | None = None

    def decode(self, value: Any) -> Any:
        """Check and convert *value* from a message.

        Raises:
            Malformed: it does not match.
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
    """Format any *value* that a peer sent for an error message, with bounded length."""
    if isinstance(value, list | dict | tuple):  # repr() could recurse too deeply
        return f"{type(value).__name__} of {len(value)} items"
    if isinstance(value, str | bytes) and len(value) > _SHOWN:
        return f"{value[:_SHOWN]!r}... of {len(value)}"
    return f"{value!r:.200}"


def list_of(item: Form) -> Form:
    """Return the form of a list whose items have the form *item*."""
    decode = item.decode
    return Form(f"a list, each item {item.what}", (list,), lambda value: [*map(decode, value)])


def optional(form: Form) -> Form:
    """Return the form of a value of *form*, or None."""
    convert = form.convert
    wrapped = None if convert is None else lambda value: None if value is None else convert(value)
    return Form(f"{form.what} or None", (*form.types, _NoneType), wrapped)


def record(what: str, items: Sequence[Form], make: Callable[[list[Any]], Any]) -> Form:
    """Return the form of a list of exactly *items*, which is passed to *make*."""
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
FETCHED = record("attributes and bytes", (ATTRIBUTES, optional(BYTES)), tuple)
VERIFIED = record("counts of blocks", (INTEGER, INTEGER, list_of(INTEGER)), Verified._make)

FILE_LOCK = record("a locked range", (FLAG, INTEGER, INTEGER, INTEGER), FileLock._make)

JOINED = record("the location of the provider's liveness word", (INTEGER, INTEGER, FLAG), tuple)
GRANTED = record(
    "a grant",
    (INTEGER, INTEGER, INTEGER, OPTIONAL_INTEGER, INTEGER, FLAG, FLAG),
    tuple,
)
MADE = Form("a new region and perhaps its grant", (list,), _made)


def numbers(what: str, count: int) -> Form:
    """Return the form of a tuple of *count* integers."""
    return record(what, (INTEGER,) * count, tuple)


def checked_arguments(name: str, forms: Sequence[Form], arguments: Any) -> list[Any]:
    """Check and convert the arguments of the operation *name* from a message.

    Raises:
        ProtocolError: their number is wrong, or one does not match its form.
    """
    if not isinstance(arguments, list) or len(arguments) != len(forms):
        raise ProtocolError(f"{name}: expected {len(forms)} arguments")
    checked = arguments.copy()
    try:
        for index, form in enumerate(forms):  # Form.decode() inlined for simple values
            value = arguments[index]
            if form.convert is None and type(value) in form.types and type(value) is not int:
                continue
            checked[index] = form.decode(value)
    except Malformed as error:
        raise ProtocolError(f"{name}: argument {index + 1}: {error}") from None
    return checked
