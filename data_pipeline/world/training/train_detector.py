"""Trains the detector: `python -m data_pipeline.world.training.train detector --minutes 20 --seed 101`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.checkpoints import WORLD
from data_pipeline.world.classes import CLASSES
from data_pipeline.world.detector import (
    DetectorConfig,
    DetectorOutput,
    WorldDetector,
    compute_centre_weights,
    make_boxes,
    make_windows,
    normalise,
)
from data_pipeline.world.scenes import Scene
from data_pipeline.world.training.fit import fit
from data_pipeline.world.training.judge_metrics import compute_average_precision
from data_pipeline.world.training.judge_training import (
    augment,
    draw_nothing,
    generate_scenes,
    logger,
    make_held_out_scenes,
    read_earlier_runs,
    write_card,
)

# Shapes: B images, H and W pixels, G grid cells per side, K classes, N objects of the batch; 4 cells around a centre.


class Targets(NamedTuple):
    images_BCHW: Tensor
    image_N: Tensor
    label_N: Tensor
    boxes_N4: Tensor
    masks_NHW: Tensor


def collate(scenes: list[Scene], rng: np.random.Generator | None, size: int = 64) -> Targets:
    """One batch; with a generator, images are augmented and some 4 % of them show nothing at all."""
    images, objects = [], []
    for scene in scenes:
        empty = rng is not None and rng.random() < 0.04
        if rng is None:
            images.append(scene.image)
        else:
            images.append(augment(draw_nothing(rng, size) if empty else scene.image, rng))
        objects.append(() if empty else scene.objects)
    pairs = [(i, o) for i, row in enumerate(objects) for o in row]
    return Targets(
        normalise(np.stack(images), size),
        torch.tensor([i for i, _ in pairs]),
        torch.tensor([CLASSES.index(o.name) for _, o in pairs]),
        torch.tensor(np.array([o.box for _, o in pairs]), dtype=torch.float32),
        torch.from_numpy(np.stack([o.mask for _, o in pairs])),
    )


def presence_loss(logit_BKGG: Tensor, targets: Targets) -> Tensor:
    """Cross entropy of every cell and class against the bilinear centre weights, summed, per object."""
    row_N4, column_N4, weight_N4 = compute_centre_weights(targets.boxes_N4, logit_BKGG.shape[2])
    wanted_BKGG = torch.zeros_like(logit_BKGG)
    where = (targets.image_N[:, None].expand(-1, 4), targets.label_N[:, None].expand(-1, 4), row_N4, column_N4)
    wanted_BKGG.index_put_(where, weight_N4, accumulate=True)
    loss = F.binary_cross_entropy_with_logits(logit_BKGG, wanted_BKGG.clamp(max=1.0), reduction="sum")
    return loss / len(targets.image_N)


def box_loss(output: DetectorOutput, targets: Targets) -> Tensor:
    """UnitBox: -log IoU of the edge distances at each of the four cells, weighted by the cell's share."""
    row_N4, column_N4, weight_N4 = compute_centre_weights(targets.boxes_N4, output.edges_B4GG.shape[2])
    found_N44 = output.edges_B4GG[targets.image_N[:, None], :, row_N4, column_N4]
    zeros = torch.zeros(row_N4.numel(), 4)
    centres = make_boxes(zeros, row_N4.flatten(), column_N4.flatten())[:, :2].view(-1, 4, 2)
    low, high = targets.boxes_N4[:, None, :2], targets.boxes_N4[:, None, 2:]
    true_N44 = torch.cat([centres - low, high - centres], 2).clamp(min=0.5)
    shared_N44 = torch.minimum(found_N44, true_N44)

    def area(edges: Tensor) -> Tensor:
        return (edges[..., 0] + edges[..., 2]) * (edges[..., 1] + edges[..., 3])

    overlap = area(shared_N44)
    iou_N4 = overlap / (area(found_N44) + area(true_N44) - overlap)
    return (weight_N4 * -iou_N4.clamp(min=1e-4).log()).sum(1).mean()


def mask_loss(detector: WorldDetector, output: DetectorOutput, targets: Targets) -> Tensor:
    """Cross entropy inside the box (grown a little) plus dice, at one cell per object drawn by its share."""
    row_N4, column_N4, weight_N4 = compute_centre_weights(targets.boxes_N4, output.logit_BKGG.shape[2])
    pick_N1 = weight_N4.multinomial(1)
    cells = [targets.image_N, row_N4.gather(1, pick_N1)[:, 0], column_N4.gather(1, pick_N1)[:, 0]]
    logit_NHW = detector.compute_mask_logits(output, torch.stack(cells, 1))
    true_NHW = targets.masks_NHW.float()
    inside_NHW = make_windows(targets.boxes_N4, logit_NHW.shape[2], margin=2.0).float()
    pixel_NHW = F.binary_cross_entropy_with_logits(logit_NHW, true_NHW, reduction="none")
    entropy_N = (pixel_NHW * inside_NHW).sum((1, 2)) / inside_NHW.sum((1, 2))
    p_NHW = logit_NHW.sigmoid() * inside_NHW
    dice_N = 1 - (2 * (p_NHW * true_NHW).sum((1, 2)) + 1) / (p_NHW.sum((1, 2)) + true_NHW.sum((1, 2)) + 1)
    return (entropy_N + 0.5 * dice_N).mean()


@torch.inference_mode()
def fit_temperature(detector: WorldDetector, scenes: list[Scene]) -> float:
    """The divisor of the class logits with the smallest cross entropy on training scenes that were not trained on."""
    batches = [collate(scenes[i : i + 64], None) for i in range(0, len(scenes), 64)]
    logits = [(detector(batch.images_BCHW).logit_BKGG, batch) for batch in batches]
    grid = [0.5 + 0.05 * k for k in range(31)]
    return min(grid, key=lambda t: sum(presence_loss(logit / t, batch).item() for logit, batch in logits))


def evaluate(detector: WorldDetector, scenes: list[Scene]) -> dict[str, float]:
    """AP of boxes and masks as COCO defines it, and how far scores are from being probabilities."""
    found = detector.detect(np.stack([scene.image for scene in scenes]), min_score=0.02)
    figures = compute_average_precision(found, [scene.objects for scene in scenes])
    rng = np.random.default_rng(7)
    blank = detector.detect(np.stack([draw_nothing(rng) for _ in range(200)]))
    figures["false detections above 0.3 per blank image"] = sum(d.score > 0.3 for row in blank for d in row) / 200
    return figures


def train_detector(
    out: Path = WORLD / "detector", *, minutes: float = 20.0, seed: int = 101, start_from: Path | None = None
) -> None:
    """Trains, fits the temperature, evaluates on held-out scenes, writes the folder."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    detector = WorldDetector.from_pretrained(start_from) if start_from else WorldDetector(DetectorConfig(CLASSES))
    scenes: Iterator[Scene] = generate_scenes(seed)

    def loss_of_step(step: int) -> Tensor:
        targets = collate([next(scenes) for _ in range(48)], rng)
        output = detector(targets.images_BCHW)
        found = presence_loss(output.logit_BKGG, targets) + box_loss(output, targets)
        return found + mask_loss(detector, output, targets)

    averaged, num_steps = fit(detector, loss_of_step, minutes=minutes, muon_lr=1e-2)
    assert isinstance(averaged, WorldDetector)
    temperature = fit_temperature(averaged, [next(scenes) for _ in range(640)])
    averaged.config = replace(averaged.config, temperature=temperature)
    averaged.save_pretrained(out)
    detector = WorldDetector.from_pretrained(out)
    figures = evaluate(detector, make_held_out_scenes(seed, 1000))
    logger.info("detector: %s", figures)
    facts = [
        "Class `data_pipeline.world.detector.WorldDetector`: boxes, classes, instance masks, calibrated scores; "
        f"{sum(p.numel() for p in detector.parameters()):,} parameters, stored in half precision.",
        f"Data: split `judge_train` (all compositions), seed {seed}, {48 * num_steps:,} scenes, each seen once; "
        "4 % of the images replaced by ones without objects.",
        f"Training: {minutes:g} minutes on {torch.get_num_threads()} CPU thread(s), fp32, Muon and AdamW, "
        f"averaged weights, temperature {temperature:.2f} fitted on 640 further training scenes.",
        *read_earlier_runs(start_from),
        f"Evaluated on 1,000 held-out scenes, seed {seed}.",
    ]
    write_card(out, "World detector", facts, figures)
