"""A plan as a file, for `ray job submit -- python -m data_pipeline run PLAN.yaml`: the command line, written down.

The keys are the options' names, nested or with dots; `plan` names the plan that they change. Options given beside the
file win. Every run leaves its own as plan.yaml at the dataset's root.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from infra import storage
from infra.codec import to_json
from infra.errors import UserError
from infra.help_text import FLAT, read_annotations

SUFFIXES = (".yaml", ".yml", ".json")
_NOT_OPTIONS = ("name", "text_spec")  # what a plan fixes by itself


def read_plan_file(uri: str) -> tuple[str, list[str]]:
    """(name of the plan, options as on the command line); JSON is YAML, too."""
    import yaml

    try:
        data = yaml.safe_load(storage.read_bytes(uri))
    except (yaml.YAMLError, UnicodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"{uri}: not YAML{where}: expected lines like 'out: s3://bucket/data'") from error
    if not isinstance(data, dict) or not isinstance(data.get("plan"), str):
        raise UserError(f"{uri}: expected options by name, among them 'plan: world' (the plan that they change)")
    options = {key: value for key, value in data.items() if key != "plan"}
    return data["plan"], [word for pair in _flatten(options, "") for word in _to_words(*pair)]


def _flatten(options: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        name = f"{prefix}{key}".replace("_", "-")
        if isinstance(value, dict):
            yield from _flatten(value, f"{name}.")
        else:
            yield name, value


def _to_words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        head, _, last = name.rpartition(".")
        off = f"{head}.no-{last}" if head else f"no-{last}"
        return [f"--{name if value else off}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", str(value)]


def encode_plan_file(name: str, run: Any, plan: Any, defaults: tuple[Any, Any]) -> bytes:
    """What a run was asked for, as a file that asks for it again: everything that differs from the defaults."""
    import yaml

    changed: dict[str, Any] = {"plan": name}
    for given, default in zip((run, plan), defaults):
        changed |= _list_changes(_list_options(given), _list_options(default))
    return yaml.safe_dump(changed, sort_keys=False, allow_unicode=True, width=120).encode()


def _list_options(options: Any) -> dict[str, Any]:
    """The command's options by name, with those of the dataclasses that are FLAT."""
    listed = to_json(options)
    for name, (_, marks) in read_annotations(type(options)).items():
        listed |= listed.pop(name) if FLAT in marks else {}
    return listed


def _list_changes(given: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    changed = {name: value for name, value in given.items() if value != default[name] and name not in _NOT_OPTIONS}
    return {
        name: _list_changes(value, default[name]) if isinstance(value, dict) else value
        for name, value in changed.items()
    }
