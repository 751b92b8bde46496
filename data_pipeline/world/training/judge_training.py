"""What the three judges' trainings share: endless scenes of their own streams, augmentation, model cards.

Judges draw from the streams `judge_train` and `judge_val` (all compositions, seen and unseen); nothing else does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from data_pipeline.world.scenes import Scene, make_scene
from data_pipeline.world.training.cards import LICENCE
from infra.log import get_logger
from infra.markdown import read_items, wrap_prose

logger = get_logger("judges")


def generate_scenes(seed: int, *, tags: Sequence[str] | None = None) -> Iterator[Scene]:
    """Fresh training scenes, four in ten of them warped; with `tags` only of these tasks, in turn."""
    rng = np.random.default_rng((seed, len(tags or ())))
    for index in itertools.count():
        tag = tags[index % len(tags)] if tags else None
        scene = make_scene(seed, index, split="judge_train", seen=None, tag=tag)
        yield warp(scene, rng) if rng.random() < 0.4 else scene


def make_held_out_scenes(seed: int, count: int) -> list[Scene]:
    """The first `count` scenes of the judges' validation stream."""
    return [make_scene(seed, i, split="judge_val", seen=None) for i in range(count)]


def augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A little of what a generated image suffers: blur, noise, a shift of tone. Leaves shapes and color names alone."""
    x = image.astype(np.float32)
    if rng.random() < 0.35:
        amount = rng.uniform(0.2, 0.9)
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)), mode="edge")
        blurred = sum(padded[i : i + x.shape[0], j : j + x.shape[1]] for i in range(3) for j in range(3)) / 9
        x += amount * (blurred - x)
    if rng.random() < 0.35:
        x += rng.normal(0.0, rng.uniform(1.0, 9.0), x.shape).astype(np.float32)
    if rng.random() < 0.35:
        x = x * rng.uniform(0.93, 1.05) + rng.uniform(-7.0, 7.0, 3).astype(np.float32)
    return np.clip(x + 0.5, 0, 255).astype(np.uint8)


def _sample_bilinear(image_HWC: np.ndarray, at_2HW: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Bilinear reading of an image at (row, column) positions; outside of it, one given color."""
    padded = np.pad(image_HWC, ((2, 2), (2, 2), (0, 0)))
    padded[:2], padded[-2:], padded[:, :2], padded[:, -2:] = outside, outside, outside, outside
    row, column = np.clip(at_2HW + 2, 0, np.array(padded.shape[:2])[:, None, None] - 1.001)
    top, left = row.astype(int), column.astype(int)
    dy, dx = (row - top)[..., None], (column - left)[..., None]
    upper = padded[top, left] * (1 - dx) + padded[top, left + 1] * dx
    return upper * (1 - dy) + (padded[top + 1, left] * (1 - dx) + padded[top + 1, left + 1] * dx) * dy


def _find_box(mask_HW: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)


def warp(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene drawn by an unsteady hand: shrunk, turned and bent a little, truth included."""
    size = len(scene.image)
    grid_2HW = np.mgrid[:size, :size].astype(float) - (size - 1) / 2
    angle, stretch = rng.uniform(-0.12, 0.12), rng.uniform(1.0, 1.15, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * stretch
    bend_2HW = _enlarge(rng.normal(0.0, rng.uniform(0.2, 1.6), (5, 5, 2)), size).transpose(2, 0, 1)
    at_2HW = np.tensordot(turn, grid_2HW, 1) + (size - 1) / 2 + bend_2HW
    border = np.concatenate([scene.image[0], scene.image[-1], scene.image[:, 0], scene.image[:, -1]])
    image = _sample_bilinear(scene.image.astype(np.float32), at_2HW, np.median(border, axis=0))
    objects = []
    for obj in scene.objects:
        mask = _sample_bilinear(obj.mask[..., None].astype(np.float32), at_2HW, np.zeros(1))[..., 0] >= 0.5
        if mask.sum() < 0.6 * obj.mask.sum():
            return scene
        box = np.clip(_find_box(mask) + np.array(obj.box) - _find_box(obj.mask), 0, size)
        objects.append(replace(obj, mask=mask, box=(box[0], box[1], box[2], box[3])))
    return replace(scene, image=np.clip(image + 0.5, 0, 255).astype(np.uint8), objects=tuple(objects))


def _enlarge(coarse_KKC: np.ndarray, size: int) -> np.ndarray:
    """A coarse grid of values, bilinearly enlarged to (size, size, C)."""
    num = len(coarse_KKC)
    at = np.linspace(0, num - 1, size)
    low = np.minimum(at.astype(int), num - 2)
    part = at - low
    rows = coarse_KKC[low] * (1 - part)[:, None, None] + coarse_KKC[low + 1] * part[:, None, None]
    return rows[:, low] * (1 - part)[None, :, None] + rows[:, low + 1] * part[None, :, None]


def draw_nothing(rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """An image without any object: smooth blotches of color with noise, from nearly flat to wild."""
    coarse = int(rng.integers(2, 17))
    blotch = rng.normal(0.0, rng.uniform(2.0, 70.0), (coarse, coarse, 3)) + rng.uniform(40, 250, 3)
    image = _enlarge(blotch, size) + rng.normal(0.0, rng.uniform(0.0, 25.0), (size, size, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def to_half(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module as it is stored: half precision, contiguous."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in module.state_dict().items()}
    return {k: v.contiguous() for k, v in state.items()}


def read_earlier_runs(start_from: Path | None) -> list[str]:
    """Lines for a model card about the weights that this training continued from, taken from their own card."""
    if start_from is None:
        return []
    items = read_items((start_from / "README.md").read_text())
    earlier = [item for item in items if item.startswith(("Data:", "Training:", "Before"))]
    return [item if item.startswith("Before") else f"Before that: {item}" for item in earlier]


def write_card(folder: Path, title: str, facts: list[str], figures: dict[str, float]) -> None:
    """The README.md of a checkpoint folder: what it is, how it was made, what it scores on held-out scenes."""
    lines = [f"# {title}", "", *[f"- {fact}" for fact in facts], "", "Held-out scenes (split `judge_val`):", ""]
    lines += ["| figure | value |", "|---|---|", *[f"| {name} | {value:.4f} |" for name, value in figures.items()], ""]
    lines += ["It judges images of the world only; its scores are named `world_*`, never after the benchmark.", ""]
    lines += [LICENCE, ""]
    (folder / "README.md").write_text(wrap_prose("\n".join(lines)))
