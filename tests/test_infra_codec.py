"""Dataclasses to JSON and back: what is kept, what is refused and in which words."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.codec import Number, from_json, to_json
from infra.errors import UserError


@dataclass(frozen=True)
class Rate:
    value: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    every: int | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        if self.value > 5:
            raise UserError("the rate is above 5: write a smaller one")


@dataclass(frozen=True, slots=True)
class Shard:
    name: str
    rows: tuple[tuple[int, int], ...] = ()
    whole: bool = True


@dataclass(frozen=True)
class Everything:
    title: str
    kind: Literal["plain", "striped"] = "plain"
    rate: Rate = field(default_factory=Rate)
    limit: Rate | None = None
    shards: tuple[Shard, ...] = ()
    by_name: Mapping[str, Shard] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()
    more: Mapping[str, Any] = field(default_factory=dict)


TEXTS, WHOLE = st.text(max_size=5), st.integers(-(2**62), 2**62)
NUMBERS = st.floats(max_value=5, allow_nan=False)
RATES = st.builds(Rate, NUMBERS, st.tuples(NUMBERS, NUMBERS), st.none() | st.just("auto") | WHOLE)
SHARDS = st.builds(Shard, TEXTS, st.lists(st.tuples(WHOLE, WHOLE), max_size=3).map(tuple), st.booleans())
PLAIN = st.recursive(st.none() | st.booleans() | WHOLE | TEXTS, lambda x: st.lists(x) | st.dictionaries(TEXTS, x))
VALUES = st.builds(
    Everything, TEXTS, st.sampled_from(["plain", "striped"]), RATES, st.none() | RATES,
    st.lists(SHARDS, max_size=3).map(tuple), st.dictionaries(TEXTS, SHARDS, max_size=2),
    st.frozensets(TEXTS, max_size=3), st.dictionaries(TEXTS, PLAIN, max_size=2),
)  # fmt: skip


@given(VALUES)
def test_what_was_encoded_is_decoded(value):
    text = json.dumps(to_json(value))
    assert from_json(Everything, text, where="f") == value
    assert from_json(Everything, text.encode(), where="f") == value
    assert from_json(Everything, json.loads(text), where="f") == value


def test_encoding_keeps_whole_numbers_and_sorts_sets():
    value = Everything("t", rate=Rate(1, (1, 0)), left_out=frozenset("cab"))
    told = to_json(value)
    assert json.dumps(told["rate"]) == '{"value": 1, "betas": [1, 0], "every": "auto"}'
    assert told["left_out"] == ["a", "b", "c"]
    assert math.isnan(from_json(Rate, json.dumps(to_json(Rate(math.nan))), where="f").value)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"titel": "t"}, "f has an unknown field 'titel' (did you mean 'title'?)"),
        ({"title": "t", "rate": {"valu": 1}}, "f: rate has an unknown field 'valu' (did you mean 'value'?)"),
        ({"title": "t", "limit": {"valu": 1}}, "f: limit has an unknown field 'valu' (did you mean 'value'?)"),
        (
            {"title": "t", "shards": [{"name": "a"}, {"name": "b", "row": []}]},
            "f: shards.1 has an unknown field 'row' (did you mean 'rows'?)",
        ),
        (
            {"title": "t", "by_name": {"a": {"nam": "x"}}},
            "f: by_name.a has an unknown field 'nam' (did you mean 'name'?)",
        ),
        ({}, "f lacks 'title'"),
        ({"title": "t", "shards": [{}]}, "f: shards.0 lacks 'name'"),
        ({"title": 3}, "f: title is 3, expected a text"),
        ({"title": None}, "f: title is None, expected a text"),
        (
            {"title": "t", "kind": "stripe"},
            "f: kind is 'stripe', expected one of plain, striped (did you mean 'striped'?)",
        ),
        ({"title": "t", "rate": {"value": "fast"}}, "f: rate.value is 'fast', expected a number"),
        ({"title": "t", "rate": {"value": True}}, "f: rate.value is True, expected a number"),
        ({"title": "t", "rate": {"every": "often"}}, "f: rate.every is 'often', expected an integer or auto"),
        ({"title": "t", "rate": {"every": 1.5}}, "f: rate.every is 1.5, expected an integer or auto"),
        ({"title": "t", "rate": [1]}, "f: rate is [1], expected an object with fields"),
        ({"title": "t", "rate": {"value": 6}}, "f: rate: the rate is above 5: write a smaller one"),
        ({"title": "t", "rate": {"betas": [1]}}, "f: rate.betas lacks '1'"),
        ({"title": "t", "shards": "abc"}, "f: shards is 'abc', expected a list"),
        ({"title": "t", "shards": [{"name": "a", "whole": 1}]}, "f: shards.0.whole is 1, expected true or false"),
        (
            {"title": "t", "shards": [{"name": "a", "rows": [[1, "2"]]}]},
            "f: shards.0.rows.0.1 is '2', expected an integer",
        ),
        ({"title": "t", "by_name": []}, "f: by_name is [], expected an object"),
        ([1], "f is [1], expected an object with fields"),
        ("", "f is not JSON (EOF while parsing a value at line 1 column 0)"),
        (b"\xff{", "f is not JSON (expected value at line 1 column 1)"),
    ],
)
def test_a_mistake_is_one_line_with_the_path_of_the_field(data, line):
    with pytest.raises(UserError) as refused:
        from_json(Everything, data, where="f")
    assert str(refused.value) == line


def test_fields_of_a_later_version_may_be_ignored():
    found = from_json(Shard, {"name": "a", "new": 1}, where="f", extra="ignore")
    assert found == Shard("a")


@dataclass(frozen=True)
class Measured:
    value: Number
    low: float | None = None
    others: tuple[Number, ...] = ()


def test_numbers_that_are_not_finite_become_null_and_come_back_as_nan():
    told = to_json(Measured(math.inf, math.nan, (1.0, -math.inf)), finite=True)
    assert told == {"value": None, "low": None, "others": [1.0, None]}
    found = from_json(Measured, json.dumps(told, allow_nan=False), where="f")
    assert math.isnan(found.value)
    assert math.isnan(found.others[1])
    assert found.low is None
    with pytest.raises(UserError, match="value is 'x', expected a number"):
        from_json(Measured, {"value": "x"}, where="f")
