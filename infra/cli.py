"""Command lines: tyro parses them; what it refuses becomes one line (what, where, what to do) instead of its box."""

import contextlib
import difflib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tyro
from tyro import _errors as refused  # private: requirements.lock pins the version, and tests read every line

from infra.errors import UserError, nearest


def parse(kind: Callable[..., Any], args: Sequence[str], *, prog: str, **options: Any) -> Any:
    """`tyro.cli(kind, args=args, prog=prog, ...)`; a mistake in `args` is a UserError."""

    def refuse(event: refused.ParseErrorEvent) -> None:
        line = _line(event, lambda: _options(kind, prog, options))
        if line:
            raise UserError(line)

    with refused.on_parse_error(refuse):
        return tyro.cli(kind, args=args, prog=prog, **options)


def parse_command(commands: Mapping[str, Callable[..., Any]], args: Sequence[str], *, prog: str, doc: str = "") -> Any:
    """The first word says which of the commands parses the others."""
    name, known = args[0] if args else "", ", ".join(commands)
    if name in ("-h", "--help"):
        return tyro.extras.subcommand_cli_from_dict(dict(commands), args=[name], prog=prog, description=doc)
    if not name or name.startswith("-"):
        raise UserError(f"{prog} needs a command first: {known}; {prog} --help says more")
    if name not in commands:
        raise UserError(f"unknown command {name!r}{nearest(name, commands)}: one of {known}; {prog} --help says more")
    return parse(commands[name], args[1:], prog=f"{prog} {name}")


def _line(event: refused.ParseErrorEvent, options: Callable[[], list[str]]) -> str:
    """Empty for what our commands do not have (their own subcommands, exclusive groups): tyro says it."""
    more = f"{event.prog} --help"
    if isinstance(event, refused.UnrecognizedArgs):
        return f"{_unknown(event.tokens, options)}; {more} lists what it takes"
    if isinstance(event, refused.MissingArgs):
        if any(token.startswith("--") for token in event.unrecognized_tokens):  # misspelt rather than forgotten
            return f"{_unknown(event.unrecognized_tokens, options)}; {more} lists what it takes"
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


def _unknown(tokens: Sequence[str], options: Callable[[], list[str]]) -> str:
    flag = next((token.partition("=")[0] for token in tokens if token.startswith("-")), None)
    if flag is None:
        return f"unexpected argument {tokens[0]!r}"
    # without the dashes, which would make any two options alike
    known = [name.lstrip("-") for name in options() if name != flag]  # help may speak of other commands' options
    close = difflib.get_close_matches(flag.lstrip("-"), known, n=1)
    return f"unknown option {flag}" + (f" (did you mean --{close[0]}?)" if close else "")


def _options(kind: Callable[..., Any], prog: str, options: Mapping[str, Any]) -> list[str]:
    """What --help lists: tyro's public way to the names."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], prog=prog, **{**options, "console_outputs": True})
    return re.findall(r"--[a-z][\w.-]*\w", text.getvalue())


def _name(argument: Any) -> str:
    """--out, or URI for one that has its place."""
    return argument.display_name().upper() if argument.is_positional() else argument.lowered.name_or_flags[0]
