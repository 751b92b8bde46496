"""Trains one judge: `python -m data_pipeline.world.train_judges detector|clip|vqa --minutes M --seed S`."""
from __future__ import annotations

from pathlib import Path

import torch
import tyro

from infra.errors import run_cli

CHECKPOINTS = Path(__file__).parent / "checkpoints"


def detector(minutes: float = 20.0, seed: int = 101, threads: int = 1, out: Path = CHECKPOINTS / "detector") -> None:
    """Class, box, mask and score of each object: the seat of Mask2Former."""
    from data_pipeline.world.train_detector import train_detector

    torch.set_num_threads(threads)
    train_detector(out, minutes=minutes, seed=seed)


def clip(minutes: float = 20.0, seed: int = 202, threads: int = 1, out: Path = CHECKPOINTS / "judge_clip") -> None:
    """Colors of masked crops, CLIP score and FID features: the seat of CLIP ViT-L/14."""
    from data_pipeline.world.train_judge_clip import train_judge_clip

    torch.set_num_threads(threads)
    train_judge_clip(out, minutes=minutes, seed=seed)


def vqa(minutes: float = 20.0, seed: int = 303, threads: int = 1, out: Path = CHECKPOINTS / "vqa") -> None:
    """Yes or no to "a red apple?": the seat of BLIP-VQA."""
    from data_pipeline.world.train_vqa import train_vqa

    torch.set_num_threads(threads)
    train_vqa(out, minutes=minutes, seed=seed)


def main() -> None:
    tyro.extras.subcommand_cli_from_dict({"detector": detector, "clip": clip, "vqa": vqa}, description=__doc__)


if __name__ == "__main__":
    run_cli(main)
