import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from deploy import strict_json
from deploy.errors import BadInputError


@dataclass(frozen=True)
class Inner:
    ratio: float


@dataclass(frozen=True)
class Outer:
    kind: Literal["a", "b"]
    pair: tuple[int, str]
    many: tuple[int | str, ...]
    inner: Inner | None
    table: dict[str, Inner]
    free: Any


GOOD = {
    "kind": "a",
    "pair": [1, "x"],
    "many": [1, "batch"],
    "inner": None,
    "table": {"k": {"ratio": 1}},
    "free": [{"x": None}],
}


def test_a_dataclass_survives_the_way_to_json_and_back():
    value = strict_json.decode(Outer, GOOD, source="it")
    assert value == Outer("a", (1, "x"), (1, "batch"), None, {"k": Inner(1.0)}, [{"x": None}])
    again = strict_json.parse(strict_json.dump(value), source="it")
    assert strict_json.decode(Outer, again, source="it") == value


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b'{"a": 1, "a": 2}', "the key 'a' twice"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' twice"),
        (b'{"a": NaN}', "NaN, which is not finite"),
        (b'{"a": -Infinity}', "not finite"),
        (b'{"a": 1e999}', "1e999, which is not finite"),
        (b'{"a": 1', "delimiter"),
        (b"\xff{}", "utf-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"{} {}", "Extra data"),
        (b"[" * 33 + b"]" * 33, "nested more than 32 deep"),
        (b"[" * 500_000, "it must be strict JSON"),
        (b" " * (1 << 20) + b"{}", "the limit is 1048576"),
        (b"9" * 5000, "digits"),
    ],
)
def test_what_is_not_strict_json_is_refused(data, found):
    with pytest.raises(BadInputError, match=found):
        strict_json.parse(data, source="it")


def test_nesting_up_to_the_limit_is_read():
    assert strict_json.parse(b"[" * 32 + b"]" * 32, source="it")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"extra": 1}, "the document has the unknown key 'extra'"),
        ({"kind": "c"}, r"the document\.kind is 'c'"),
        ({"pair": [1]}, r"\.pair has 1 items, not 2"),
        ({"pair": [1, 2]}, r"\.pair\[1\] is 2, not str"),
        ({"pair": "1x"}, r"\.pair is '1x'"),
        ({"many": [1.5]}, r"\.many\[0\] is 1\.5"),
        ({"many": [True]}, r"\.many\[0\] is True"),
        ({"inner": {}}, r"\.inner has no key 'ratio'"),
        ({"inner": {"ratio": "1"}}, r"\.inner\.ratio is '1', not float"),
        ({"inner": {"ratio": True}}, r"\.inner\.ratio is True"),
        ({"table": {"k": None}}, r"\.table\.k is None"),
        ({"table": []}, r"\.table is \[\]"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(change, found):
    with pytest.raises(BadInputError, match=found):
        strict_json.decode(Outer, GOOD | change, source="it")


def test_a_missing_key_is_named():
    with pytest.raises(BadInputError, match="the document has no key 'free'"):
        strict_json.decode(Outer, {k: v for k, v in GOOD.items() if k != "free"}, source="it")


def test_dumping_refuses_numbers_that_are_not_finite():
    with pytest.raises(ValueError, match="not JSON compliant"):
        strict_json.dump(Inner(float("inf")))


@dataclass(frozen=True)
class Left:
    a: int
    more: int | None = field(default=None, metadata=strict_json.OPTIONAL)


@dataclass(frozen=True)
class Right:
    b: int


@dataclass(frozen=True)
class Either:
    one: Left | Right


def test_a_key_that_may_be_missing_is_left_out_when_it_says_nothing():
    assert strict_json.dump(Left(1)) == b'{\n "a": 1\n}\n'
    assert json.loads(strict_json.dump(Left(1, 2))) == {"a": 1, "more": 2}
    for value in (Left(1), Left(1, 2)):
        parsed = strict_json.parse(strict_json.dump(value), source="x")
        assert strict_json.decode(Left, parsed, source="x") == value


@pytest.mark.parametrize("value", [Left(1), Right(1)])
def test_of_several_dataclasses_the_keys_say_which_is_meant(value):
    parsed = strict_json.parse(strict_json.dump(Either(value)), source="x")
    assert strict_json.decode(Either, parsed, source="x") == Either(value)


@pytest.mark.parametrize("document", [{}, {"a": 1, "b": 1}, {"a": 1, "c": 1}, {"more": 1}])
def test_keys_of_no_dataclass_are_refused(document):
    with pytest.raises(BadInputError, match=r"the document\.one has"):
        strict_json.decode(Either, {"one": document}, source="x")
