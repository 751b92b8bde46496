"""Trains a tiny checkpoint of the world: `python -m data_pipeline.world.training.train vae --minutes 25`.

Autoencoder, CLIP and captioner see scenes of seen compositions only, the judges all; each has a stream of its own.
OMP_NUM_THREADS sets the threads; without it there is one.
"""

import torch

from infra.cli import Command, run_commands
from infra.device import choose_num_threads
from infra.errors import run_cli

HERE = "data_pipeline.world.training"
COMMANDS = {
    "vae": Command(f"{HERE}.train_vae:train_vae", "the autoencoder whose latents the pipeline stores"),
    "clip": Command(f"{HERE}.train_clip:train_clip", "the OpenCLIP model whose text tower conditions the generator"),
    "captioner": Command(
        f"{HERE}.train_captioner:train_captioner", "the model that looks at pixels and writes the synthetic captions"
    ),
    "detector": Command(
        f"{HERE}.train_detector:train_detector",
        "class, box, mask and score of each object: the seat of Mask2Former",
    ),
    "judge_clip": Command(
        f"{HERE}.train_judge_clip:train_judge_clip",
        "colors of masked crops, CLIP score and FID features: the seat of CLIP ViT-L/14",
    ),
    "vqa": Command(f"{HERE}.train_vqa:train_vqa", 'yes or no to "a red apple?": the seat of BLIP-VQA'),
    "check": Command(
        f"{HERE}.judge_check:print_check",
        "scores of held-out scenes under their own prompts and under others' prompts, one line each",
    ),
}


def main() -> None:
    torch.set_num_threads(choose_num_threads(1))
    run_commands(f"python -m {HERE}.train", COMMANDS, __doc__ or "")


if __name__ == "__main__":
    run_cli(main)
