"""What people mistype: one line that says what, where and what to do, and exit code 2."""

import importlib
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import tyro

from infra.cli import Command, CommandGroup, parse, run_commands, take_name
from infra.errors import UserError, run_cli


@dataclass(frozen=True)
class Options:
    """Options of a command."""

    place: tyro.conf.Positional[str]
    """Where."""
    images: int
    """How many."""
    split: Literal["train", "val"] = "train"
    """Which."""
    depths: Annotated[tuple[int, ...], tyro.conf.arg(metavar="D ...")] = (2, 3)
    """Depths of the rungs."""

    def __post_init__(self) -> None:
        if self.images < 1:
            raise UserError(f"--images {self.images}: expected 1 or more")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("x --images 1 --spilt val", "unknown option --spilt (did you mean --split?); prog --help lists what it takes"),
        ("x --image=3", "unknown option --image (did you mean --images?); prog --help lists what it takes"),
        ("x --images 1 --bogus", "unknown option --bogus; prog --help lists what it takes"),
        ("x y --images 1", "unexpected argument 'y'; prog --help lists what it takes"),
        ("", "prog needs PLACE and --images; prog --help says more"),
        ("x", "prog needs --images; prog --help says more"),
        ("x --images", "--images needs INT; prog --help says more"),
        ("x --images many", "--images: expected INT (invalid literal for int() with base 10: 'many'); prog --help "),
        ("x --images 1 --depths a", "--depths: expected D ... ("),
        ("x --images 1 --split vla", "--split vla (did you mean 'val'?): expected one of train, val"),
        ("x --images 0", "--images 0: expected 1 or more"),
    ],
)
def test_every_refusal_is_one_line(words, line, capsys):
    with pytest.raises(UserError) as caught:
        parse(Options, words.split(), prog="prog")
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
    printed = capsys.readouterr()
    assert printed.out + printed.err == ""


def go(options: Options) -> None:
    """What it does."""
    print(options)


def leave(words: list[str]) -> None:
    print(words)


COMMANDS = {
    "go": Command(f"{__name__}:go", "goes somewhere"),
    "leave": Command(f"{__name__}:leave", "leaves", takes_words=True),
    "far": CommandGroup({"away": Command(f"{__name__}:go", "goes away")}, "below a command"),
    "broken": Command("no.such.module:function", "is never imported unless it is called"),
}


def test_what_is_right_is_parsed(capsys):
    assert parse(Options, ["x", "--images", "3"], prog="prog") == Options("x", 3)
    for words in (["go"], ["far", "away"]):
        run_commands("prog", COMMANDS, "A program.", words=[*words, "x", "--images", "3"])
        assert capsys.readouterr().out == f"{Options('x', 3)}\n"
    run_commands("prog", COMMANDS, "A program.", words=["leave", "--any", "thing"])
    assert capsys.readouterr().out == "['--any', 'thing']\n"
    assert take_name(["one", "--more"], ["one", "two"], prog="prog", what="number") == ("one", ["--more"])


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_without_a_command_the_commands_are_listed(words, capsys):
    run_commands("prog", COMMANDS, "A program.", words=words)
    out = capsys.readouterr().out
    assert out.startswith("usage: prog COMMAND")
    assert "A program." in out
    assert all(f"  {name}" in out for name in COMMANDS)


def test_help_of_commands_groups_and_names(capsys):
    with pytest.raises(SystemExit) as done:
        run_commands("prog", COMMANDS, "A program.", words=["go", "--help"])
    out = capsys.readouterr().out
    assert not done.value.code
    assert "usage: prog go" in out
    assert "What it does." in out
    run_commands("prog", COMMANDS, "A program.", words=["far", "--help"])
    assert "usage: prog far COMMAND" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        take_name(["--help"], {"one": "the first"}, prog="prog", what="number")
    assert not done.value.code
    assert "one  the first" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("infra doctr", "unknown command 'doctr' (did you mean 'doctor'?): one of doctor, launch, make-bucket, "),
        ("infra --name x", "python -m infra needs a command first: doctor, launch, make-bucket, supervise; "),
        ("trainer train", "python -m trainer train needs a recipe first: "),
        ("trainer train wrld-d2", "unknown recipe 'wrld-d2' (did you mean 'world-d2'?): one of "),
        ("trainer sweep rates world", "unknown command 'rates'"),
        ("model infos", "unknown command 'infos' (did you mean 'info'?): one of info, formulations, "),
        ("infra doctor --ur x", "unknown option --ur (did you mean --uri?); python -m infra doctor --help lists"),
        ("eval run --bogus 1", "unknown option --bogus; python -m eval run --help lists what it takes"),
        ("eval report", "python -m eval report needs --runs; python -m eval report --help says more"),
        ("eval geneval jdge", "unknown command 'jdge' (did you mean 'judge'?): one of prompts, judge, score; "),
        ("trainer export R --data x --out y --steps 3", "unknown option --steps"),
        ("data_pipeline run world --imags 3", "unknown option --imags (did you mean --images?); "),
        ("data_pipeline inspect", "python -m data_pipeline inspect needs URI; "),
    ],
)
def test_every_command_of_the_house_refuses_in_one_line(words, line, capsys, monkeypatch):
    package, *rest = words.split()
    monkeypatch.setattr(sys, "argv", [package, *rest])
    with pytest.raises(SystemExit) as done:
        run_cli(importlib.import_module(f"{package}.__main__").main)
    printed = capsys.readouterr()
    assert done.value.code == 2
    assert printed.err.startswith(f"error: {line}")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
