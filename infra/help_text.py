"""--help that fits a screen and a half: a command's own options, and the names of those that stand in groups.

tyro knows names, types, defaults and comments, and prints them all; here its text is read back and set anew.
"""

import contextlib
import dataclasses
import inspect
import io
import os
import re
import shutil
import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tyro

FLAT = tyro.conf.arg(name="")
"""Of a dataclass among the options: its fields are the command's own, `--images` instead of `--recipe.images`."""
GROUP = tyro.conf.arg(name="", help="")
"""The same names, under a heading of their own. A dataclass can also name groups of its fields, as
HELP_GROUPS: ClassVar = {"heading: what they decide": ("field", ...)}."""
MOST_LINES = 60
INDENT = 30
ONE_COLUMN = "129"  # from 130 columns on tyro sets boxes beside each other


@dataclass(frozen=True)
class Entry:
    """One option as tyro describes it: `--steps INT` and its comment with the default."""

    invocation: str
    text: str

    @property
    def flag(self) -> str:
        return self.invocation.split()[0].rstrip(",")


@dataclass(frozen=True)
class HelpGroup:
    """A heading and the flags below it: those named, or all that begin with `--prefix.`."""

    title: str
    flags: frozenset[str]
    prefix: str = ""

    def holds(self, flag: str) -> bool:
        return flag.startswith(f"--{self.prefix}.") if self.prefix else flag in self.flags


def describe_command(kind: Callable[..., Any], prog: str, options: Mapping[str, Any], *, everything: bool) -> str:
    """The help of a command. The options of groups are given by name alone where all together would be too long."""
    description, entries = read_entries(kind, prog, options)
    groups = list(find_groups(kind))
    full = _lay_out(prog, description, entries, groups, brief=False)
    if everything or full.count("\n") < MOST_LINES:
        return full
    return _lay_out(prog, description, entries, groups, brief=True)


def read_entries(kind: Callable[..., Any], prog: str, options: Mapping[str, Any]) -> tuple[str, list[Entry]]:
    """(what the command does, its options in order) from tyro's own help."""
    printed = io.StringIO()  # no terminal, so tyro draws no boxes: a title at column 1, what is under it at column 2
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit), _set_columns(ONE_COLUMN):
        tyro.cli(kind, args=["--help"], prog=prog, **{**options, "console_outputs": True})
    head, _, body = re.sub(r" +$", "", printed.getvalue(), flags=re.MULTILINE).partition("\n\n ")
    names = iter(name for name, (_, marks) in read_annotations(kind).items() if tyro.conf.Positional in marks)
    entries: list[Entry] = []
    start = 0  # of the entries of this box
    for line in f" {body}".splitlines():
        if re.match(r" \S", line):
            start = len(entries)
        elif line.startswith("  ---") and not line.strip("- "):
            del entries[start:]  # what came before the rule described the box
        elif re.match(r"  \S", line):
            name, _, text = line.strip().partition("  ")
            entries.append(Entry(name if name.startswith("-") else next(names, name).upper(), text.strip()))
        elif line:
            last = entries.pop()
            entries.append(Entry(last.invocation, f"{last.text} {line.strip()}".strip()))
    return head.partition("\n\n")[2].strip(), [entry for entry in entries if entry.flag != "-h"]


def find_groups(kind: Any, prefix: str = "") -> Iterator[HelpGroup]:
    """A command's HELP_GROUPS and the dataclasses among its options; those that are FLAT are looked into."""
    for title, fields in getattr(kind, "HELP_GROUPS", {}).items():
        yield HelpGroup(title, _list_flags(prefix, fields))
    for name, (inner, marks) in read_annotations(kind).items():
        if not dataclasses.is_dataclass(inner):
            continue
        if FLAT in marks:
            yield from find_groups(inner, prefix)
        elif GROUP in marks:
            yield HelpGroup(
                _make_title(name, inner, ()), _list_flags(prefix, [field.name for field in dataclasses.fields(inner)])
            )
            yield from find_groups(inner, prefix)
        else:
            yield HelpGroup(_make_title(name, inner, marks), frozenset(), f"{prefix}{name.replace('_', '-')}")


def _list_flags(prefix: str, fields: Iterable[str]) -> frozenset[str]:
    return frozenset(f"--{prefix}{name.replace('_', '-')}" for name in fields)


def read_annotations(kind: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Name -> (type, what Annotated adds to it) of a dataclass's fields or a function's parameters."""
    hints = typing.get_type_hints(kind, include_extras=True)
    is_class = dataclasses.is_dataclass(kind)
    names = [f.name for f in dataclasses.fields(kind)] if is_class else list(inspect.signature(kind).parameters)
    found = [(name, hints[name]) for name in names if name in hints]
    return {
        name: (hint.__origin__, hint.__metadata__) if hasattr(hint, "__metadata__") else (hint, ())
        for name, hint in found
    }


def _make_title(name: str, kind: Any, marks: Sequence[Any]) -> str:
    """The option's own help (GROUP has none), else the first sentence of its class."""
    text = next((mark.help for mark in marks if getattr(mark, "help", None)), kind.__doc__ or "")
    first = re.split(r"(?<=[.;:])\s", " ".join(text.split()))[0].rstrip(".;:")
    return f"{name.replace('_', ' ')}: {first[:1].lower()}{first[1:]}" if first[1:2].islower() else f"{name}: {first}"


def _lay_out(prog: str, description: str, entries: Sequence[Entry], groups: Sequence[HelpGroup], *, brief: bool) -> str:
    positional = [entry for entry in entries if not entry.flag.startswith("-")]
    found = {group: [entry for entry in entries if group.holds(entry.flag)] for group in groups}
    grouped = {entry for held in found.values() for entry in held}
    own = [entry for entry in entries if entry.flag.startswith("-") and entry not in grouped]
    own.sort(key=lambda entry: "(required)" not in entry.text)
    usage = " ".join(["usage:", prog, *(entry.invocation for entry in positional), "[options]"])
    lines = [usage, "", *_wrap_paragraphs(description), ""]
    for title, held in (("arguments", positional), ("options", own)):
        lines += [f"{title}:", *(line for entry in held for line in _wrap_entry(entry)), ""] if held else []
    if brief:
        lines += ["more options, by groups (--help-all says what they do):"]
        lines += [line for group, held in found.items() if held for line in _wrap_names(group, held)]
    else:
        for group, held in found.items():
            if held:
                lines += [f"{group.title}:", *(line for entry in held for line in _wrap_entry(entry)), ""]
    return "\n".join(lines).rstrip()


def format_table(rows: Iterable[tuple[str, str]]) -> str:
    """Names, and beside them what they are."""
    found = list(rows)
    indent = max(len(name) for name, _ in found) + 4
    lines = []
    for name, text in found:
        first, *more = textwrap.wrap(text, _get_width() - indent, break_on_hyphens=False) or [""]
        lines += [f"  {name}".ljust(indent) + first, *(" " * indent + line for line in more)]
    return "\n".join(lines)


def _get_width() -> int:
    return max(60, min(120, shutil.get_terminal_size((100, 24)).columns))


def _wrap_paragraphs(text: str) -> list[str]:
    blocks = [textwrap.fill(" ".join(block.split()), _get_width()) for block in text.split("\n\n")]
    return "\n\n".join(blocks).splitlines()


def _wrap_entry(entry: Entry) -> list[str]:
    """The option, and what it does in a column of its own."""
    shown = re.sub(r"\[(\w+) \[\1 \.\.\.\]\]", r"\1 ...", entry.invocation).replace("{None}|", "")
    shown = re.sub(r"(--[\w.-]+), --[\w.-]*no-[\w-]+", r"\1", shown)  # --flag, --no-flag
    text = re.sub(r" ?\(default: (None)?\)", "", entry.text)
    off = re.search(r", (--[\w.-]*no-[\w-]+)", entry.invocation)
    text = text.replace("(default: True)", f"(default: yes; no: {off[1]})" if off else "(default: yes)")
    text = text.replace("(default: False)", "").rstrip()
    wrapped = textwrap.wrap(text, _get_width() - INDENT, break_on_hyphens=False) or [""]
    head = f"  {shown}"
    if len(head) > INDENT - 2:
        return [head.rstrip(), *(" " * INDENT + line for line in wrapped if line)]
    return [f"{head:<{INDENT}}{wrapped[0]}".rstrip(), *(" " * INDENT + line for line in wrapped[1:])]


def _wrap_names(group: HelpGroup, entries: Sequence[Entry]) -> list[str]:
    """`model  --model.depth .patch .qk-norm`: the prefix once."""
    flags = [entry.flag for entry in entries]
    if group.prefix:
        flags = [flags[0], *(flag.removeprefix(f"--{group.prefix}") for flag in flags[1:])]
    head = f"  {group.title.partition(':')[0]:<12}"
    return textwrap.wrap(
        " ".join(flags), _get_width(), initial_indent=head, subsequent_indent=" " * 14, break_on_hyphens=False
    )


@contextlib.contextmanager
def _set_columns(number: str) -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = number
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
