"""Command lines: a table of commands, options by tyro, and each mistake as one line (what, where, what to do)."""

import dataclasses
import difflib
import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import tyro
from tyro import _errors as refused  # private: requirements.lock pins the version, and tests read every line

from infra.errors import UserError, nearest
from infra.help_text import FLAT, GROUP, describe_command, format_table, read_entries

__all__ = [
    "FLAT", "GROUP", "HELP", "Command", "CommandGroup", "Commands", "UsageError", "choose", "parse", "run_command",
    "run_commands", "take_name",
]  # fmt: skip
HELP = ("-h", "--help", "--help-all")
Parsed = TypeVar("Parsed")


class UsageError(UserError):
    """The words of a command line that cannot be understood; nothing has been done yet."""


@dataclass(frozen=True)
class Command:
    """A function, imported when it is called: the options of its one dataclass, or its own parameters, are parsed."""

    target: str
    """"package.module:function"."""
    help: str
    takes_words: bool = False
    """Hand over the words unparsed: for a function whose first word chooses the defaults of its options."""

    def load(self) -> Callable[..., Any]:
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class CommandGroup:
    """Commands below a command: `python -m eval geneval judge`."""

    commands: Mapping[str, Command]
    help: str


Commands = Mapping[str, Command | CommandGroup]


def run_commands(prog: str, commands: Commands, doc: str, *, words: Sequence[str] | None = None) -> None:
    """Run the command that the first word names (`words`: the process's own); no word or --help lists the commands."""
    name, *rest = (sys.argv[1:] if words is None else words) or ["--help"]
    if name in HELP:
        table = format_table((known, command.help) for known, command in commands.items())
        print(f"usage: {prog} COMMAND [options]\n\n{doc.strip()}\n\n{table}\n\n{prog} COMMAND --help says more")
        return
    choose(name, commands, prog=prog, what="command")
    command = commands[name]
    if isinstance(command, CommandGroup):
        run_commands(f"{prog} {name}", command.commands, command.help, words=rest)
    elif command.takes_words:
        command.load()(rest)
    else:
        run_command(command.load(), rest, prog=f"{prog} {name}")


def run_command(function: Callable[..., Any], words: Sequence[str], *, prog: str) -> None:
    """Call `function` with what the words say: its one parameter's dataclass, or each of its parameters an option."""
    parameters = list(inspect.signature(function).parameters)
    kind = typing.get_type_hints(function)[parameters[0]] if len(parameters) == 1 else None
    if dataclasses.is_dataclass(kind):
        function(parse(kind, words, prog=prog, description=function.__doc__))  # type: ignore[arg-type]
    else:
        parse(function, words, prog=prog)


def take_name(words: Sequence[str], known: Iterable[str], *, prog: str, what: str) -> tuple[str, list[str]]:
    """(first word, the others), where the first chooses one of `known`: `world-d2` of `train world-d2 --images 9`.

    --help in its place lists them (a mapping: each with its help) and ends the process.
    """
    name, *rest = words or [""]
    if name in HELP:
        lines = [f"usage: {prog} {what.upper()} [options]", ""]
        lines += [format_table(known.items() if isinstance(known, Mapping) else [(what.upper(), ", ".join(known))])]
        print("\n".join([*lines, "", f"{prog} {what.upper()} --help lists the options"]))
        raise SystemExit(0)
    choose(name, known, prog=prog, what=what)
    return name, rest


def choose(name: str, known: Iterable[str], *, prog: str, what: str) -> None:
    """Refuse a name that is not known."""
    names = list(known)
    if not name or name.startswith("-"):
        raise UsageError(f"{prog} needs a {what} first: {', '.join(names)}; {prog} --help says more")
    if name not in names:
        expected = f"one of {', '.join(names)}; {prog} --help says more"
        raise UsageError(f"unknown {what} {name!r}{nearest(name, names)}: {expected}")


def parse(kind: Callable[..., Parsed], words: Sequence[str], *, prog: str, **options: Any) -> Parsed:
    """`tyro.cli(kind, args=words, prog=prog, ...)`; a mistake in `words` is a UsageError."""

    def refuse(event: refused.ParseErrorEvent) -> None:
        line = _describe_refusal(event, lambda: [entry.flag for entry in read_entries(kind, prog, options)[1]])
        if line:
            raise UsageError(line)

    if set(words) & set(HELP):
        print(describe_command(kind, prog, options, everything="--help-all" in words))
        raise SystemExit(0)
    with refused.on_parse_error(refuse):
        return tyro.cli(kind, args=words, prog=prog, **options)  # type: ignore[no-any-return]


def _describe_refusal(event: refused.ParseErrorEvent, options: Callable[[], list[str]]) -> str:
    """Empty for what our commands do not have (their own subcommands, exclusive groups): tyro says it."""
    more = f"{event.prog} --help"
    if isinstance(event, refused.UnrecognizedArgs):
        return f"{_describe_unknown(event.tokens, options)}; {more} lists what it takes"
    if isinstance(event, refused.MissingArgs):
        if any(token.startswith("--") for token in event.unrecognized_tokens):  # misspelt rather than forgotten
            return f"{_describe_unknown(event.unrecognized_tokens, options)}; {more} lists what it takes"
        return f"{event.prog} needs {' and '.join(_name(a.arg) for a in event.missing_arguments)}; {more} says more"
    if isinstance(event, refused.InvalidChoice):
        known = ", ".join(event.choices)
        return f"{_name(event.argument)} {event.value}{nearest(event.value, event.choices)}: expected one of {known}"
    if isinstance(event, refused.BadValue):
        wanted = f"needs {event.argument.lowered.metavar}" if event.offending_value is None else "takes no value"
        return f"{_name(event.argument)} {wanted}; {more} says more"
    if isinstance(event, refused.InstantiationFailure):
        if event.argument is None:
            return event.message
        return f"{_name(event.argument)}: expected {event.argument.lowered.metavar} ({event.message}); {more} says more"
    return ""


def _describe_unknown(tokens: Sequence[str], options: Callable[[], list[str]]) -> str:
    flag = next((token.partition("=")[0] for token in tokens if token.startswith("-")), None)
    if flag is None:
        return f"unexpected argument {tokens[0]!r}"
    # without the dashes, which would make any two options alike
    known = [name.lstrip("-") for name in options() if name != flag]  # help may speak of other commands' options
    close = difflib.get_close_matches(flag.lstrip("-"), known, n=1)
    return f"unknown option {flag}" + (f" (did you mean --{close[0]}?)" if close else "")


def _name(argument: Any) -> str:
    """--out, or URI for one that has its place."""
    return argument.display_name().upper() if argument.is_positional() else argument.lowered.name_or_flags[0]
