"""The options of an augmentation, as a recipe writes them: each of its type and in its range."""

import math
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from edgereg.errors import RecipeError

__all__ = ["checked"]


def checked(value: Any, kind: Any, key: str) -> Any:
    """Return an option's value, as its type; a pair as a tuple.

    Args:
        value: As the recipe has it.
        kind: The option's type: int, float, bool, str, a Literal, a pair of numbers
            (tuple[float, float]), dict, list, or one of these or None.
        key: Names the option in the recipe.

    Raises:
        RecipeError: It is of another type, a negative number, an empty range, or a probability
            outside [0, 1].
    """
    if get_origin(kind) in (Union, UnionType):
        if value is None:
            return None
        (kind,) = (other for other in get_args(kind) if other is not NoneType)
    name, is_of_kind = _kind(kind)
    if not is_of_kind(value):
        raise RecipeError(
            f"this option is {name}", found=f"{key}: {value!r}", remedy=f"give {name}"
        )
    if _is_number(value):
        _check_number(value, key)
    elif get_origin(kind) is tuple:
        value = tuple(value)
        if not 0 < value[0] <= value[1]:
            raise RecipeError(
                "a range is [low, high], 0 < low <= high",
                found=f"{key}: {list(value)}",
                remedy="change it",
            )
    return value


def _kind(kind: Any) -> tuple[str, Callable[[Any], bool]]:
    """Return a type's name and what tells its values."""
    if get_origin(kind) is Literal:
        allowed = get_args(kind)
        return f"one of {', '.join(map(str, allowed))}", lambda value: value in allowed
    kinds: dict[Any, tuple[str, Callable[[Any], bool]]] = {
        bool: ("true or false", lambda value: isinstance(value, bool)),
        int: ("a whole number", lambda value: _is_number(value) and isinstance(value, int)),
        float: ("a number", _is_number),
        str: ("a text", lambda value: isinstance(value, str)),
        tuple: ("a pair of numbers", _is_pair),
        list: ("a list", lambda value: isinstance(value, list)),
        dict: ("a mapping", lambda value: isinstance(value, Mapping)),
    }
    return kinds[get_origin(kind) or kind]


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value))


def _check_number(value: float, key: str) -> None:
    if key.endswith(".probability") and not 0 <= value <= 1:
        raise RecipeError(
            "a probability lies in [0, 1]", found=f"{key}: {value}", remedy="change it"
        )
    if value < 0:
        raise RecipeError("an amount is not negative", found=f"{key}: {value}", remedy="change it")
