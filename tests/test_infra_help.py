"""--help of every command: a screen and a half at most, with every option named, and all of it with --help-all."""

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import pytest

from infra.cli import FLAT, GROUP, Command, CommandGroup, parse, run_commands

PACKAGES = ("model", "infra", "data_pipeline", "trainer", "eval")
FIRST = {  # the word that chooses the defaults of the other options
    "run": "world", "train": "world-d2", "plan": "world-d2", "verify-resume": "world-d2", "ladder": "world",
    "lr": "world", "formulations": "world-d2",
}  # fmt: skip
LINES = 60


def all_commands() -> Iterator[tuple[str, ...]]:
    """Package and words of every command, those of groups and the lists of commands included."""

    def below(commands: dict[str, Command | CommandGroup], words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield words
        for name, command in commands.items():
            if isinstance(command, CommandGroup):
                yield from below(dict(command.commands), (*words, name))
                continue
            yield (*words, name)
            if command.takes_words and name in FIRST:
                yield (*words, name, FIRST[name])

    for package in PACKAGES:
        yield from below(importlib.import_module(f"{package}.__main__").COMMANDS, (package,))


def show(words: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str]) -> str:
    package, *rest = words
    commands = importlib.import_module(f"{package}.__main__").COMMANDS
    try:
        run_commands(f"python -m {package}", commands, "What it is for.", words=[*rest, word])
    except SystemExit as done:
        assert not done.code  # noqa: PT017
    return capsys.readouterr().out


@pytest.mark.parametrize("words", all_commands(), ids=" ".join)
def test_help_fits_a_screen_and_a_half(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    brief = show(words, "--help", capsys)
    assert brief.startswith(f"usage: python -m {' '.join(words)}")
    assert brief.count("\n") <= LINES
    assert max(map(len, brief.splitlines())) <= 100
    full = show(words, "--help-all", capsys)
    options = re.findall(r"^  --([a-z][\w.-]*)", full, re.MULTILINE)
    assert len(set(options)) == len(options)
    missing = [name for name in options if f"--{name}" not in brief and f".{name.rpartition('.')[2]}" not in brief]
    assert not missing


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn. And more."""

    steps: int = 25
    """Steps of the sampler."""
    guidance: float | None = None


@dataclass(frozen=True)
class Inner:
    """Not seen."""

    depths: tuple[int, ...] = (2, 3)
    optimizer: Drawing = Drawing()


@dataclass(frozen=True)
class Options:
    """Options of a command."""

    HELP_GROUPS: ClassVar = {"machines: who works": ("workers",)}
    late: str
    """Required, and therefore first."""
    workers: int = 0
    flag: bool = True
    inner: Annotated[Inner, FLAT] = Inner()
    drawing: Annotated[Drawing, GROUP] = Drawing()


def test_options_stand_under_their_headings(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse(Options, ["--help-all"], prog="prog")
    assert (
        capsys.readouterr().out
        == """\
usage: prog [options]

Options of a command.

options:
  --late STR                  Required, and therefore first. (required)
  --flag                      (default: yes; no: --no-flag)
  --depths INT ...            (default: 2 3)

machines: who works:
  --workers INT               (default: 0)

optimizer: how pictures are drawn:
  --optimizer.steps INT       Steps of the sampler. (default: 25)
  --optimizer.guidance FLOAT

drawing: how pictures are drawn:
  --steps INT                 Steps of the sampler. (default: 25)
  --guidance FLOAT
"""
    )


def test_long_help_gives_groups_by_name(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("infra.help_text.MOST_LINES", 10)
    with pytest.raises(SystemExit):
        parse(Options, ["x", "-h"], prog="prog")
    assert (
        capsys.readouterr().out.partition("more options")[2]
        == """\
, by groups (--help-all says what they do):
  machines    --workers
  optimizer   --optimizer.steps .guidance
  drawing     --steps --guidance
"""
    )
