"""Strict JSON: text that is read one way only, and dataclasses that say what may stand in it.

`json.loads` keeps the last of two equal keys, accepts NaN, and follows any nesting. A manifest
decides what a device runs, so here all of this is refused, and so is a key that no field asked for.
"""

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from deploy.errors import BadInputError

__all__ = ["MAX_BYTES", "MAX_DEPTH", "OPTIONAL", "decode", "dump", "parse"]

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
OPTIONAL: Mapping[str, bool] = {"optional": True}
"""The metadata of a field whose key may be missing; `dump` leaves out what equals its default."""

T = TypeVar("T")


def parse(data: bytes, *, source: str) -> Any:
    """Parse a JSON document.

    Args:
        data: The document, UTF-8.
        source: What it is, for the error: a file's name.

    Raises:
        BadInputError: It is too large, not JSON, repeats a key, nests too deeply, or holds a
            number that is not finite.
    """
    if len(data) > MAX_BYTES:
        raise _refusal(source, f"{len(data)} bytes; the limit is {MAX_BYTES}")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_constant=_finite,
        )
        depth = _depth(value)
    except (ValueError, RecursionError) as error:  # JSON, UTF-8 and our hooks all raise ValueError
        raise _refusal(source, str(error)) from error
    if depth > MAX_DEPTH:
        raise _refusal(source, f"values nested more than {MAX_DEPTH} deep")
    return value


def decode(kind: type[T], value: Any, *, source: str) -> T:
    """Build a dataclass from parsed JSON, whose fields' types say what is allowed.

    Supported are dataclasses, `tuple`, `dict[str, ...]`, `Literal`, unions, JSON's scalars and
    `Any`. Of several dataclasses in a union the one is meant that has the object's keys.

    Args:
        kind: The dataclass.
        value: Parsed JSON.
        source: What is decoded, for the error: a file's name.

    Raises:
        BadInputError: A key is unknown or missing, or a value has the wrong type; it is named.
    """
    try:
        return typing.cast(T, _decode(kind, value, "the document"))
    except _MismatchError as error:
        raise _refusal(source, str(error)) from error


def dump(value: Any) -> bytes:
    """Write a dataclass as JSON; equal values give equal bytes.

    Raises:
        ValueError: A number is not finite.
    """
    text = json.dumps(_plain(value), sort_keys=True, indent=1, allow_nan=False)
    return (text + "\n").encode("utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    pairs = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
    return {
        field.name: _plain(item)
        for field, item in pairs
        if not (field.metadata == OPTIONAL and item == field.default)
    }


class _MismatchError(Exception):
    """A value is not of the type that its field asks for."""


def _refusal(source: str, found: str) -> BadInputError:
    return BadInputError(
        f"{source} must be strict JSON with exactly the documented keys",
        found=found,
        remedy="write the file again with the tool that made it",
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} twice in one object")
    return result


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # NaN, Infinity, and 1e999
        raise ValueError(f"the number {text}, which is not finite")
    return number


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        fitting = [option for option in arguments if _has_json_type(option, value)]
        if not fitting:
            raise _MismatchError(f"{where} is {value!r:.80}, not {kind}")
        named = (o for o in fitting if dataclasses.is_dataclass(o) and _keys(o) == value.keys())
        return _decode(next(named, fitting[0]), value, where)
    if not _has_json_type(kind, value):
        raise _MismatchError(f"{where} is {value!r:.80}, not {getattr(kind, '__name__', kind)}")
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if origin is dict:
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise _MismatchError(f"{where} has {len(value)} items, not {len(kinds)}")
        items = enumerate(zip(kinds, value, strict=True))
        return tuple(_decode(item_kind, item, f"{where}[{i}]") for i, (item_kind, item) in items)
    return float(value) if kind is float else value


def _has_json_type(kind: Any, value: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return any(
            value == choice and type(value) is type(choice) for choice in typing.get_args(kind)
        )
    if origin is dict or dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    if origin is tuple:
        return isinstance(value, list)
    if isinstance(value, bool):  # which Python counts among the integers
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _decode_dataclass(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints, optional = _hints(kind), _optional(kind)
    unknown = sorted(value.keys() - hints.keys())
    missing = sorted(hints.keys() - value.keys() - optional)
    if unknown or missing:
        problems = [f"the unknown key {key!r}" for key in unknown]
        problems += [f"no key {key!r}" for key in missing]
        raise _MismatchError(f"{where} has {' and '.join(problems)}")
    return kind(**{key: _decode(hints[key], item, f"{where}.{key}") for key, item in value.items()})


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)  # which evaluates them anew each time


@functools.cache
def _optional(kind: Any) -> frozenset[str]:
    fields = dataclasses.fields(kind)
    return frozenset(field.name for field in fields if field.metadata == OPTIONAL)


def _keys(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}
