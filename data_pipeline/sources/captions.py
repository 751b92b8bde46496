"""Which field of a source is the caption, and what counts as one: name and type decide, never what is at hand."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from data_pipeline.sources.source import draw_one
from infra.errors import UserError, nearest

# The first decides where it is there; of the others there may be one.
CAPTION_NAMES = ("caption", "captions")
OTHER_NAMES = ("text", "txt", "prompt", "description")


class Caption(NamedTuple):
    """The caption of a row, all that the source has for it, and why there is none ("" where there is one)."""

    text: str
    all: tuple[str, ...] = ()
    problem: str = ""


def read_caption(value: object, key: str) -> Caption:
    """A cell or a text file as a caption. Of several texts the row's key draws one; numbers and structs are none."""
    if value is None or isinstance(value, Caption):
        return value or Caption("")
    if isinstance(value, bytes | bytearray):
        try:
            return read_caption(decode_text(bytes(value)), key)
        except UnicodeError:
            return Caption("", problem="the caption is not UTF-8")
    if isinstance(value, str):
        if "\0" in value:
            return Caption("", problem="the caption holds zero bytes")
        try:
            value.encode()
        except UnicodeError:
            return Caption("", problem="the caption is not UTF-8")
        return Caption(value, (value,) if value.strip() else ())
    if isinstance(value, list | tuple):
        found = [read_caption(item, key) for item in value]
        texts = tuple(text for one in found for text in one.all)
        if texts:
            return Caption(draw_one(f"caption/{key}", texts), texts)
        return Caption("", problem=next((one.problem for one in found if one.problem), "an empty list of captions"))
    if isinstance(value, float) and math.isnan(value):
        return Caption("", problem="the caption is NaN")
    if isinstance(value, Mapping):
        return Caption("", problem=f"the caption is a struct of {', '.join(map(str, value))}, not a text")
    return Caption("", problem=f"the caption is of type {type(value).__name__}, not a text")


def decode_text(data: bytes) -> str:
    """UTF-8, or UTF-16 where a byte order mark says so, as Windows writes it. UnicodeError otherwise."""
    return data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")


def parse_fields(data: bytes, field: str = "") -> tuple[dict[str, Any], object]:
    """(fields of a JSON file beside a picture, its caption); what is no object is all caption. `field`: the field that
    --caption-column names."""
    try:
        content = json.loads(decode_text(data))
    except ValueError:
        return {}, Caption("", problem="the file beside the picture is no JSON")
    return (content, find_caption(content, field)) if isinstance(content, dict) else ({}, content)


def find_caption(fields: Mapping[str, Any], field: str = "") -> object:
    """The caption in a JSON object, or why there is none: the candidates' names. `field` names the only candidate."""
    if field:
        return fields[field] if field in fields else Caption("", problem=f"no field {field}, but {_list_names(fields)}")
    for names in (CAPTION_NAMES[:1], CAPTION_NAMES[1:]):
        for name in fields:
            if name.lower() in names and fields[name] is not None:
                return fields[name]
    known = [name for name in fields if name.lower() in (*CAPTION_NAMES, *OTHER_NAMES)]
    not_null = [name for name in known if fields[name] is not None]
    if len(not_null) > 1:
        return Caption("", problem=f"{' and '.join(not_null)} may each be the caption: use --caption-column")
    texts = [name for name, value in fields.items() if isinstance(value, str) and value.strip()]
    if not known and texts:
        return Caption("", problem=f"no field is named caption, but {_list_names(texts)}: use --caption-column")
    return fields[not_null[0]] if not_null else None


def _list_names(names: Iterable[str]) -> str:
    """At most eight names, for a row's reason."""
    listed = list(names)
    return ", ".join(listed[:8]) + (" ..." if len(listed) > 8 else "") if listed else "nothing"


def is_text(kind: pa.DataType) -> bool:
    """A type that captions may have: texts, bytes of texts, lists of them."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return is_text(kind.value_type)
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    strings = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(check(kind) for check in (*strings, pa.types.is_binary, pa.types.is_large_binary))


def choose_caption_column(types: Mapping[str, pa.DataType], column: str, where: str) -> str:
    """The caption column of a table; UserError that lists the candidates where it would be a guess."""
    candidates = [name for name, kind in types.items() if is_text(kind) and not pa.types.is_binary(kind)]
    listed = ", ".join(f"{name} ({kind})" for name, kind in types.items() if name in candidates) or "none of text"
    if column:
        if column not in types:
            raise UserError(f"{where}: no caption column {column}; it has {', '.join(types)}{nearest(column, types)}")
        if not is_text(types[column]) and not pa.types.is_null(types[column]):
            raise UserError(f"{where}: column {column} is of type {types[column]}, no text; candidates: {listed}")
        return column
    named = [name for name in types if name.lower() in CAPTION_NAMES]
    named_alike = named or [name for name in types if name.lower() in OTHER_NAMES]
    # a column of nulls in one of many files: its rows have no caption
    if len(named_alike) == 1 and (is_text(types[named_alike[0]]) or pa.types.is_null(types[named_alike[0]])):
        return named_alike[0]
    if len(named_alike) == 1:
        reason = f"column {named_alike[0]} is of type {types[named_alike[0]]}, no text"
    elif named_alike:
        reason = f"{' and '.join(named_alike)} may each be the caption"
    else:
        reason = f"no caption column named {', '.join((*CAPTION_NAMES, *OTHER_NAMES))}"
    raise UserError(f"{where}: {reason}: name it with --caption-column; candidates: {listed}")
