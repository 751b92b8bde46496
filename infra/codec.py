"""Typed dataclasses to JSON and back. Data that do not fit the class are refused with one line.

`from_json` is strict: an unknown field, a value of another type and a missing field without a default are errors. The
rules are those of pydantic's strict mode for JSON: lists become tuples, and whole numbers become floats where a float
is expected. A check in `__post_init__` runs as in the constructor.
"""

import dataclasses
import functools
import json
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, TypeAdapter, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails

from infra.errors import UserError, nearest

T = TypeVar("T")
EXPECTED = {  # pydantic's type of error -> the words for what was expected
    "int_type": "an integer", "int_from_float": "an integer", "float_type": "a number", "bool_type": "true or false",
    "string_type": "a text", "tuple_type": "a list", "list_type": "a list", "set_type": "a list",
    "frozen_set_type": "a list", "dict_type": "an object", "mapping_type": "an object",
    "dataclass_type": "an object with fields", "none_required": "null",
}  # fmt: skip


# A float that may be nan or infinite, which JSON has no number for: `to_json(..., finite=True)` writes null, and null
# is read back as nan.
Number = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "null"}]}),
]


def to_json(value: Any, *, finite: bool = False) -> Any:
    """Dataclasses as objects, tuples as lists, sets as sorted lists; everything else as it is.

    `finite`: a number that is nan or infinite becomes null.
    """
    if finite and isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name), finite=finite) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_json(inner, finite=finite) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(inner, finite=finite) for inner in value]
    return sorted(value) if isinstance(value, set | frozenset) else value


def from_json(
    kind: type[T], data: Any, *, where: str, advice: str = "", extra: Literal["forbid", "ignore"] = "forbid"
) -> T:
    """A value of type `kind` from `data`: JSON text (bytes or str), or the result of `json.loads`.

    UserError names `where`, the path of the field, the value found, what was expected, and `advice` for the user.
    """
    text = data if isinstance(data, bytes | str) else json.dumps(data)
    try:
        return _get_adapter(typing.cast(Any, kind)).validate_json(text, strict=True, extra=extra)
    except ValidationError as error:
        line = _describe_mistake(kind, where, error.errors(include_url=False))
        raise UserError(f"{line}: {advice}" if advice else line) from None


@functools.cache
def _get_adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _describe_mistake(kind: Any, where: str, errors: list[ErrorDetails]) -> str:
    """One line for the first mistake. A misspelt field is told before the missing field that it causes."""
    error = min(errors, key=lambda each: each["type"] != "unexpected_keyword_argument")
    if error["type"] == "json_invalid":
        return f"{where} is not JSON ({error['msg'].removeprefix('Invalid JSON: ')})"
    path, known = _follow_path(kind, error)
    if error["type"] in ("unexpected_keyword_argument", "missing"):
        name = path.pop()
        owner = f"{where}: {'.'.join(path)}" if path else where
        if error["type"] == "missing":
            return f"{owner} lacks {name!r}"
        return f"{owner} has an unknown field {name!r}{nearest(name, known)}"
    field = f"{where}: {'.'.join(path)}" if path else where
    if error["type"] == "value_error":  # of a __post_init__ or a validator of ours, which says all that is to say
        return f"{field}: {error['ctx']['error']}"
    alike = [each for each in errors if _follow_path(kind, each)[0] == path]  # one for each arm of a union
    return f"{field} is {reprlib.repr(error['input'])}, expected {' or '.join(map(_describe_expected, alike))}"


def _describe_expected(error: ErrorDetails) -> str:
    if error["type"] == "literal_error":
        allowed = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        close = nearest(error["input"], allowed) if isinstance(error["input"], str) else ""
        return f"{'one of ' if len(allowed) > 1 else ''}{', '.join(allowed)}{close}"
    return EXPECTED.get(error["type"], error["msg"].removeprefix("Input should be "))


def _follow_path(kind: Any, error: ErrorDetails) -> tuple[list[str], list[str]]:
    """(the names of the fields that lead to the mistake, all field names of the class of the last one)."""
    path: list[str] = []
    known: list[str] = []
    for step in error["loc"]:
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            arms = [arm for arm in typing.get_args(kind) if arm is not type(None)]
            if len(arms) > 1:  # pydantic names the arm here
                kind = next((arm for arm in arms if getattr(arm, "__name__", "") == step), None)
                continue
            kind = arms[0]
        path.append(str(step))
        known = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
        inner = typing.get_args(kind)
        if known:
            kind = typing.get_type_hints(kind).get(str(step))
        elif isinstance(step, int) and Ellipsis not in inner and len(inner) > step:
            kind = inner[step]
        else:  # the element of a list, the value of a mapping
            kind = next((each for each in reversed(inner) if each is not Ellipsis), None)
    return path, known
