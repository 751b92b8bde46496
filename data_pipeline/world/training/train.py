"""Trains a tiny checkpoint of the pipeline: `python -m data_pipeline.world.training.train vae|clip|captioner`.

Each draws endless fresh scenes from a stream of its own, seen compositions only. The judges train by train_judges.py.
"""

from pathlib import Path

import torch

from infra.cli import Command, run_commands
from infra.errors import run_cli

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"


def vae(
    minutes: float = 25.0,
    seed: int = 11,
    threads: int = 1,
    channels: int = 8,
    decoder_only: bool = False,
    out: Path = CHECKPOINTS / "vae",
    start_from: Path | None = None,
    lr: float = 1e-2,
) -> None:
    """The autoencoder whose latents the pipeline stores."""
    from data_pipeline.world.training.train_vae import train_vae

    torch.set_num_threads(threads)
    train_vae(
        out, minutes=minutes, seed=seed, channels=channels, decoder_only=decoder_only, start_from=start_from, lr=lr
    )


def clip(
    minutes: float = 20.0,
    seed: int = 21,
    threads: int = 1,
    out: Path = CHECKPOINTS / "clip",
    start_from: Path | None = None,
    lr: float = 4e-3,
) -> None:
    """The OpenCLIP model whose text tower conditions the generator."""
    from data_pipeline.world.training.train_clip import train_clip

    torch.set_num_threads(threads)
    train_clip(out, minutes=minutes, seed=seed, start_from=start_from, lr=lr)


def captioner(
    minutes: float = 20.0,
    seed: int = 31,
    threads: int = 1,
    out: Path = CHECKPOINTS / "captioner",
    start_from: Path | None = None,
    lr: float = 4e-3,
) -> None:
    """The model that looks at pixels and writes the synthetic captions."""
    from data_pipeline.world.training.train_captioner import train_captioner

    torch.set_num_threads(threads)
    train_captioner(out, minutes=minutes, seed=seed, start_from=start_from, lr=lr)


COMMANDS = {
    "vae": Command("data_pipeline.world.training.train:vae", "the autoencoder whose latents the pipeline stores"),
    "clip": Command(
        "data_pipeline.world.training.train:clip", "the OpenCLIP model whose text tower conditions the generator"
    ),
    "captioner": Command(
        "data_pipeline.world.training.train:captioner",
        "the model that looks at pixels and writes the synthetic captions",
    ),
}


def main() -> None:
    run_commands("python -m data_pipeline.world.training.train", COMMANDS, __doc__ or "")


if __name__ == "__main__":
    run_cli(main)
