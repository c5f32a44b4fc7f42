"""Read protobuf's wire format by a table of fields, and nothing that the table does not name.

A message is a row of (number, wire type, value). protobuf's own readers are lenient: a field that
they do not know is skipped, one that comes twice is merged or the last wins, and two readers may
differ in it. Here each of these is refused, so that what was checked is what is loaded.

Nothing is copied: bytes stay views of the file. Work is bounded by a budget of fields.

Source: protobuf's documentation of its encoding.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Budget", "Kind", "MalformedError", "Table", "read_fields"]

Kind = Literal[
    "int",  # a varint, signed
    "float",  # a fixed32, of which only the presence matters
    "bytes",  # text, bytes or a message
    "many",  # any number of the former
    "ints",  # any number of varints, packed or not
    "varints",  # the same; only how many
    "fixed32",  # any number of fixed32, packed or not; only how many
    "fixed64",  # the same of fixed64
    "refused",  # may not be there
]
Table = Mapping[int, tuple[str, Kind]]
"""Field numbers, with the name and kind of each."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_WIRE_TYPES: dict[Kind, tuple[int, ...]] = {
    "int": (_VARINT,),
    "float": (_FIXED32,),
    "bytes": (_LENGTH,),
    "many": (_LENGTH,),
    "ints": (_VARINT, _LENGTH),
    "varints": (_VARINT, _LENGTH),
    "fixed32": (_FIXED32, _LENGTH),
    "fixed64": (_FIXED64, _LENGTH),
}
_SINGLE = ("int", "float", "bytes")
_WIDTHS = {"fixed32": 4, "fixed64": 8}
_NOT_LAST = bytes(range(0x80, 0x100))  # a varint's bytes but the last
_MAX_INTS = 1 << 16  # of one field whose values are read one by one


class MalformedError(Exception):
    """Bytes that are no message of the table; the text says what was found."""


@dataclass
class Budget:
    """How many fields may still be read."""

    fields: int

    def spend(self, count: int = 1) -> None:
        """Count fields.

        Raises:
            MalformedError: There are too many.
        """
        self.fields -= count
        if self.fields < 0:
            raise MalformedError("more fields than any export has")


def read_fields(data: memoryview, table: Table, budget: Budget, *, what: str) -> dict[str, Any]:
    """Read one message.

    Args:
        data: Its bytes.
        table: The fields that it may have.
        budget: Of the whole file.
        what: The message, for errors: "a node".

    Returns:
        By name: an int, a memoryview, a list of memoryviews or ints, or a count. A single field
        that is not there has no entry; of the others it is empty or 0.

    Raises:
        MalformedError: It is cut short, or has a field of another number or type, or a single one
            twice.
    """
    found: dict[str, Any] = {
        name: 0 if kind in ("varints", "fixed32", "fixed64") else []
        for name, kind in table.values()
        if kind not in (*_SINGLE, "refused")
    }
    for number, wire_type, value in _scan(data, budget, what):
        name, kind = table.get(number, (f"field {number}", "refused"))
        if kind == "refused":
            raise MalformedError(f"{what} with {name}")
        if wire_type not in _WIRE_TYPES[kind]:
            raise MalformedError(f"{what} whose {name} has wire type {wire_type}")
        if kind in _SINGLE:
            if name in found:
                raise MalformedError(f"{what} with {name} twice")
            found[name] = value
        elif kind == "many":
            found[name].append(value)
        elif kind == "ints":
            found[name] += [value] if wire_type == _VARINT else _varints(value, budget, what)
        elif kind == "varints":
            found[name] += 1 if wire_type == _VARINT else _count_varints(value, what)
        else:
            found[name] += 1 if wire_type != _LENGTH else _count_fixed(value, _WIDTHS[kind], what)
    return found


def _scan(data: memoryview, budget: Budget, what: str) -> Iterator[tuple[int, int, Any]]:
    at, end = 0, len(data)
    while at < end:
        budget.spend()
        key, at = _varint(data, at, what)
        number, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            value, at = _varint(data, at, what)
            yield number, wire_type, value - (1 << 64) if value >> 63 else value
            continue
        if wire_type == _LENGTH:
            size, at = _varint(data, at, what)
        elif wire_type in (_FIXED32, _FIXED64):
            size = 4 if wire_type == _FIXED32 else 8
        else:  # the groups of old, and numbers without a meaning
            raise MalformedError(f"{what} with wire type {wire_type}")
        if size > end - at:
            raise MalformedError(f"{what} that is cut short")
        yield number, wire_type, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int, what: str) -> tuple[int, int]:
    """The number at a place, in [0, 2**64), and the place behind it."""
    value = shift = 0
    for place in range(at, min(at + 10, len(data))):
        byte = data[place]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, place + 1
        shift += 7
    raise MalformedError(f"{what} with a number that does not end, or is too large")


def _varints(data: memoryview, budget: Budget, what: str) -> list[int]:
    if len(data) > _MAX_INTS:
        raise MalformedError(f"{what} with a list of {len(data)} bytes")
    budget.spend(len(data) // 2)
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at, what)
        values.append(value - (1 << 64) if value >> 63 else value)
    return values


def _count_varints(data: memoryview, what: str) -> int:
    if len(data) and data[-1] >= 0x80:
        raise MalformedError(f"{what} with a number that does not end, or is too large")
    return len(bytes(data).translate(None, delete=_NOT_LAST))


def _count_fixed(data: memoryview, width: int, what: str) -> int:
    if len(data) % width:
        raise MalformedError(f"{what} with {len(data)} bytes of numbers of {width}")
    return len(data) // width
