"""Trains one judge: `python -m data_pipeline.world.training.train_judges detector|clip|vqa --minutes M --seed S`."""

from __future__ import annotations

from pathlib import Path

import torch

from infra.cli import Command, run_commands
from infra.errors import run_cli

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"


def detector(
    minutes: float = 20.0,
    seed: int = 101,
    threads: int = 1,
    out: Path = CHECKPOINTS / "detector",
    start_from: Path | None = None,
) -> None:
    """Class, box, mask and score of each object: the seat of Mask2Former."""
    from data_pipeline.world.training.train_detector import train_detector

    torch.set_num_threads(threads)
    train_detector(out, minutes=minutes, seed=seed, start_from=start_from)


def clip(
    minutes: float = 20.0,
    seed: int = 202,
    threads: int = 1,
    out: Path = CHECKPOINTS / "judge_clip",
    start_from: Path | None = None,
) -> None:
    """Colors of masked crops, CLIP score and FID features: the seat of CLIP ViT-L/14."""
    from data_pipeline.world.training.train_judge_clip import train_judge_clip

    torch.set_num_threads(threads)
    train_judge_clip(out, minutes=minutes, seed=seed, start_from=start_from)


def vqa(
    minutes: float = 20.0,
    seed: int = 303,
    threads: int = 1,
    out: Path = CHECKPOINTS / "vqa",
    start_from: Path | None = None,
) -> None:
    """Yes or no to "a red apple?": the seat of BLIP-VQA."""
    from data_pipeline.world.training.train_vqa import train_vqa

    torch.set_num_threads(threads)
    train_vqa(out, minutes=minutes, seed=seed, start_from=start_from)


def check(per_task: int = 100, threads: int = 1) -> None:
    """Scores of held-out scenes under their own prompts and under others' prompts, one line each."""
    from data_pipeline.world.training.judge_check import check as figures_of

    torch.set_num_threads(threads)
    for name, value in figures_of(CHECKPOINTS, per_task=per_task).items():
        print(f"{name:32s} {value:.4f}")


COMMANDS = {
    "detector": Command(
        "data_pipeline.world.training.train_judges:detector",
        "class, box, mask and score of each object: the seat of Mask2Former",
    ),
    "clip": Command(
        "data_pipeline.world.training.train_judges:clip",
        "colors of masked crops, CLIP score and FID features: the seat of CLIP ViT-L/14",
    ),
    "vqa": Command(
        "data_pipeline.world.training.train_judges:vqa", 'yes or no to "a red apple?": the seat of BLIP-VQA'
    ),
    "check": Command(
        "data_pipeline.world.training.train_judges:check",
        "scores of held-out scenes under their own prompts and under others' prompts, one line each",
    ),
}


def main() -> None:
    run_commands("python -m data_pipeline.world.training.train_judges", COMMANDS, __doc__ or "")


if __name__ == "__main__":
    run_cli(main)
