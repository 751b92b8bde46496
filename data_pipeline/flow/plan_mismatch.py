"""Columns that do not fit a plan, each with the setting that changed: reported before anything is computed.

Fingerprints alone keep encodings apart; this says why two differ, and which column would have to be rebuilt.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipeline.curation.scores import is_score_column
from data_pipeline.formats.schema import DatasetInfo
from infra.errors import UserError, nearest

_COSTLY = ("caption", "latents", "text_")  # what training reads and what is expensive


def find_mismatches(stands: DatasetInfo, wanted: DatasetInfo) -> dict[str, str]:
    """Columns to rebuild and what changed, from one description to the other; columns that follow are not named."""
    columns = {**wanted.columns, **stands.columns}
    changed = [name for name in columns if name.startswith(_COSTLY) and not is_score_column(name)]
    changed = [name for name in changed if stands.columns.get(name) != wanted.columns.get(name)]
    if not changed:
        return {}
    names = sorted({*stands.settings, *wanted.settings})
    changes = {name: list(_list_changes(stands.settings.get(name), wanted.settings.get(name))) for name in names}
    found = {name: ", ".join(lines) for name, lines in changes.items() if lines}
    return found or dict.fromkeys(sorted(changed), "made by other settings")  # made-up data name no settings


def _list_changes(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            yield from _list_changes(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path + ': ' if path else ''}{_shorten(old)} -> {_shorten(new)}"


def _shorten(value: Any) -> str:
    """An absent setting is none; a table of buckets would fill the line."""
    text = "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def describe_mismatches(found: Mapping[str, str]) -> str:
    return "; ".join(f"column {name} ({change})" for name, change in found.items())


def check_rebuild(root: str, stands: DatasetInfo, wanted: DatasetInfo, rebuild: Sequence[str]) -> None:
    """UserError unless `rebuild` names every column of the dataset at `root` that no longer fits the plan."""
    unknown = [name for name in rebuild if name not in wanted.columns]
    if unknown:
        known = ", ".join(wanted.columns)
        raise UserError(f"--rebuild {unknown[0]}: no such column{nearest(unknown[0], wanted.columns)}: one of {known}")
    found = find_mismatches(stands, wanted)
    if found.keys() - set(rebuild):
        raise UserError(
            f"the dataset at {root} does not fit this plan: {describe_mismatches(found)}: run the same command with "
            f"--rebuild {' '.join(found)}, which rebuilds these columns and what reads them, or give another --out"
        )
