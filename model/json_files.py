"""JSON files that describe weights: one reader, whose errors say which file and what was expected."""

import json
from typing import Any

from infra.errors import UserError


def parse_json_object(text: str | bytes, source: str) -> dict[str, Any]:
    """The object in `text`; UserError, which names `source`, where it is anything else."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{source} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{source} is JSON of type {type(found).__name__}, expected an object")
    return found
