"""The one exception of this package for mistakes of its user, one line that says what was found and what to do.

Beside it are the pieces of such lines, and the one reader of JSON that raises it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import Any


class ModelError(ValueError):
    """A value, name or file that the model package cannot work with."""


def hint(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" when a known name is close, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def some(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def json_object(text: str | bytes, source: str) -> dict[str, Any]:
    """Parsed; anything but an object is refused."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{source} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ModelError(f"{source} is JSON of type {type(found).__name__}, expected an object")
    return found
