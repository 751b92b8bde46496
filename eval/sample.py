"""Draw prompts with exported weights: a labelled grid, and single images in GenEval's folder layout on request."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from eval.generate import Job, Painter, Sampling
from eval.geneval_files import write_folder
from eval.pictures import labelled_grid, write_picture
from eval.prompts import read_lines
from infra.errors import UserError
from infra.log import Progress

SHOWN = 128  # small images are enlarged to this many pixels at least


def sample(
    weights: str,
    prompts: tuple[str, ...],
    out: str = "grid.png",
    *,
    images_per_prompt: int = 4,
    scale: int | None = None,
    folders: str | None = None,
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling(),  # noqa: B008 - frozen
) -> None:
    """Draw prompts with exported weights into one labelled grid.

    Args:
        weights: exported weights, e.g. RUN/weights/ema.safetensors (local or s3://)
        prompts: what to draw, one string each; or one .txt (a prompt per line) or .jsonl file
        out: the grid to write; its prompts and seeds go into a .json beside it
        images_per_prompt: pictures of each prompt, side by side
        scale: enlarge pixels by this factor; by default pictures smaller than 128 pixels are
        folders: write the single pictures here too, in GenEval's layout
        sampling: how pictures are drawn
    """
    if images_per_prompt < 1:
        raise UserError("--images-per-prompt must be 1 or more")
    texts = expand(prompts)
    painter = Painter(weights, device=sampling.device)
    rows = draw(painter, texts, images_per_prompt, sampling)
    if folders is not None:
        for index, (text, images) in enumerate(rows):
            write_folder(folders, index, {"tag": "prompt", "include": [], "prompt": text}, images)
    write_grid(out, rows, scale=scale)
    beside = {"prompts": texts, "images_per_prompt": images_per_prompt, "sampling": sampling.protocol()}
    Path(out).with_suffix(".json").write_text(json.dumps(beside, indent=1) + "\n", encoding="utf-8")
    print(out)


def expand(prompts: Sequence[str]) -> list[str]:
    """The prompts themselves, or those of the one file that was named."""
    if len(prompts) == 1 and prompts[0].endswith((".txt", ".jsonl")):
        return read_lines(prompts[0])
    texts = [text.strip() for text in prompts]
    if not texts or not all(texts):
        raise UserError('nothing to draw: give --prompts "a photo of a red apple" ..., none of them empty')
    return texts


def draw(
    painter: Painter, texts: Sequence[str], images_per_prompt: int, sampling: Sampling
) -> list[tuple[str, list[np.ndarray]]]:
    """Pictures per prompt, in order. The same words twice are drawn once and shown twice."""
    jobs = [Job(text, number=number) for text in dict.fromkeys(texts) for number in range(images_per_prompt)]
    with Progress(len(jobs), "images", desc="draw") as progress:
        pictures = {}
        for job, image in painter.paint(jobs, replace(sampling, batch=min(sampling.batch, len(jobs)))):
            pictures[job] = image
            progress.update(1)
    return [(text, [pictures[Job(text, number=number)] for number in range(images_per_prompt)]) for text in texts]


def write_grid(out: str, rows: Sequence[tuple[str, Sequence[np.ndarray]]], *, scale: int | None = None) -> None:
    height = rows[0][1][0].shape[0]
    write_picture(out, labelled_grid(rows, scale=scale or max(1, -(-SHOWN // height))))
