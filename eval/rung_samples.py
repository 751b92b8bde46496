"""Sample grids of a ladder: the same prompts and seeds from a few checkpoints of every run, into RUN/samples/."""

import io
import json

import numpy as np

from eval.generate import Painter, Sampling
from eval.pictures import labelled_grid
from eval.run import Checkpoint, find_checkpoints
from eval.sample import draw
from infra import storage
from infra.errors import UserError
from infra.log import get_logger
from model.errors import ModelError

log = get_logger("samples")

PER_RUN = 3
PROMPTS = (
    "a photo of a red apple",
    "a photo of a dog",
    "a photo of two bananas",
    "a photo of three cats",
    "a photo of a blue car",
    "a photo of a carrot left of a dog",
    "a photo of a kite above a boat",
    "a photo of a green umbrella and a purple bird",
)
IMAGES_PER_PROMPT = 2


def draw_missing(runs: str) -> None:
    """Grids that are not there yet. World models only: others need a GPU and `python -m eval sample`."""
    try:
        checkpoints = find_checkpoints(runs, str(PER_RUN))
    except UserError:
        return
    for checkpoint in checkpoints:
        try:
            _draw_one(checkpoint)
        except (UserError, ModelError) as error:
            log.warning("%s step %d: no samples: %s", checkpoint.run, checkpoint.step, error)


def _draw_one(checkpoint: Checkpoint) -> None:
    painter = Painter(checkpoint.weights)
    target = storage.join(checkpoint.run_uri, "samples", f"images_{int(painter.meta.get('images_seen', 0)):09d}")
    if storage.exists(target + ".png") or not str(painter.meta["vae"]["checkpoint"]).startswith("world:"):
        return
    sampling = Sampling()
    rows = draw(painter, PROMPTS, IMAGES_PER_PROMPT, sampling)
    scale = max(1, 128 // rows[0][1][0].shape[0])
    told = {"prompts": list(PROMPTS), "images_per_prompt": IMAGES_PER_PROMPT, "sampling": sampling.protocol()}
    storage.write_bytes(target + ".json", (json.dumps(told, indent=1) + "\n").encode())
    storage.write_bytes(target + ".png", _png(labelled_grid(rows, scale=scale, columns=4)))


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
