"""Average precision as COCO defines it, for boxes and masks, over the world's detections."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipeline.world.detector import Detection, compute_iou
from data_pipeline.world.scenes import SceneObject

THRESHOLDS = np.round(np.arange(0.5, 1.0, 0.05), 2)
RECALLS = np.linspace(0.0, 1.0, 101)


def _compute_mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 0.0


def _match(overlaps: np.ndarray, threshold: float) -> list[bool]:
    """Greedy matching in order of score: each detection takes the free object that it covers best."""
    free = np.ones(overlaps.shape[1], bool)
    hits = []
    for row in overlaps:
        best = int(np.argmax(np.where(free, row, -1.0))) if free.any() else -1
        hit = best >= 0 and bool(free[best]) and row[best] >= threshold
        if hit:
            free[best] = False
        hits.append(hit)
    return hits


def _integrate_precision(scores: np.ndarray, hits: np.ndarray, num_true: int) -> float:
    """Mean over 101 recall points of the best precision at that recall or above."""
    order = np.argsort(-scores, kind="stable")
    hits = hits[order].astype(np.float64)
    true_so_far = np.cumsum(hits)
    precision = true_so_far / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    recall = true_so_far / num_true
    at = np.searchsorted(recall, RECALLS - 1e-9, side="left")
    return float(np.append(precision, 0.0)[np.minimum(at, len(precision))].mean())


def compute_average_precision(
    found: Sequence[Sequence[Detection]], truth: Sequence[Sequence[SceneObject]]
) -> dict[str, float]:
    """`box AP50`, `box AP50:95`, `mask AP50`, `mask AP50:95`: mean over the classes that occur."""
    areas: dict[str, list[np.ndarray]] = {"box": [], "mask": []}
    for name in sorted({o.name for row in truth for o in row}):
        scores: list[float] = []
        hits: dict[str, list[list[bool]]] = {"box": [], "mask": []}
        num_true = 0
        for detections, objects in zip(found, truth, strict=True):
            found_of_name = [d for d in detections if d.name == name]
            real = [o for o in objects if o.name == name]
            num_true += len(real)
            scores += [d.score for d in found_of_name]
            shape = len(found_of_name), len(real)
            boxes = np.array([[compute_iou(d.box, o.box) for o in real] for d in found_of_name]).reshape(shape)
            masks = np.array([[_compute_mask_iou(d.mask, o.mask) for o in real] for d in found_of_name]).reshape(shape)
            for kind, overlaps in (("box", boxes), ("mask", masks)):
                hits[kind] += [list(row) for row in zip(*[_match(overlaps, t) for t in THRESHOLDS])]
        for kind in areas:
            table = np.array(hits[kind], dtype=bool).reshape(len(scores), len(THRESHOLDS))
            areas[kind].append(
                np.array(
                    [_integrate_precision(np.array(scores), table[:, k], num_true) for k in range(len(THRESHOLDS))]
                )
            )
    figures = {}
    for kind, rows in areas.items():
        figures[f"{kind} AP50"] = float(np.mean([row[0] for row in rows]))
        figures[f"{kind} AP50:95"] = float(np.mean(rows))
    return figures
