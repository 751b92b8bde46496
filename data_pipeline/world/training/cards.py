"""Model cards of the world's checkpoints: one README.md per folder, always the same headings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.world.classes import ATTRIBUTION
from infra.markdown import read_items, wrap_prose

LICENCE = f"""{ATTRIBUTION}.
The weights were trained on scenes made from these drawings and are shared under the same licence, CC BY-SA 4.0."""


@dataclass(frozen=True)
class Figure:
    """One held-out score."""

    name: str
    value: float
    unit: str


def read_training_line(folder: Path | None) -> str:
    """What the card of an earlier checkpoint says about its training, to begin the card of its continuation."""
    if folder is None:
        return ""
    for item in read_items((folder / "README.md").read_text(encoding="ascii")):
        if item.startswith("Trained by: "):
            return item.removeprefix("Trained by: ") + "; then "
    return ""


def write_card(
    folder: Path, *, title: str, what: str, load: str, trained: str, scored: str, figures: Sequence[Figure]
) -> None:
    rows = "\n".join(f"| {figure.name} | {figure.value:.4g}{figure.unit and ' ' + figure.unit} |" for figure in figures)
    text = f"""# {title}

{what}

- Load: {load}
- Trained by: {trained}
- Scored on: {scored}

| held-out figure | value |
|---|---|
{rows}

It knows the drawings of the world and nothing else; its scores say nothing about photographs.

{LICENCE}
"""
    (folder / "README.md").write_text(wrap_prose(text), encoding="ascii")
