"""Validation loss of exported weights: the trainer's own protocol, measured again from the file alone."""

from collections.abc import Iterator
from typing import Any

import torch

from data_pipeline.batch import LatentBatch
from data_pipeline.loader import Dataset, open_dataset
from eval.generate import Painter
from eval.metric import Score
from infra.errors import UserError
from model.validation import get_protocol, validation_losses

BATCH = 32  # fixed: figures must not depend on it


def val_loss(painter: Painter, data: str, *, protocol: str = "sd3", samples: int = 2048, seed: int = 0) -> list[Score]:
    """`PROTOCOL` and `PROTOCOL/t0.125` ...: mean and, per noise level, its own mean, over the first `samples`."""
    dataset = open_dataset(data, split="val")
    expected = painter.meta.get("data_fingerprint")
    if expected and dataset.fingerprint != expected:
        raise UserError(f"{data} is dataset {dataset.fingerprint}, but these weights were trained on {expected}")
    chosen = get_protocol(protocol)
    with torch.inference_mode():
        losses_BV = torch.cat(
            [
                validation_losses(painter.model, batch, chosen.levels, seed, formulation=painter.meta["formulation"])
                for batch in _batches(dataset, samples, seed)
            ]
        )
    count = len(losses_BV)
    scores = [_score(protocol, losses_BV[:, : chosen.averaged].mean(1))]
    scores += [_score(f"{protocol}/t{level:g}", losses_BV[:, k]) for k, level in enumerate(chosen.levels)]
    assert all(score.sample_count == count for score in scores)
    return scores


def _score(path: str, loss_B: torch.Tensor) -> Score:
    """Mean with a normal 95 % interval over samples."""
    mean = loss_B.mean().item()
    half = 1.96 * loss_B.std().item() / len(loss_B) ** 0.5 if len(loss_B) > 1 else None
    details: dict[str, Any] = {}
    if half is None:
        return Score(path, mean, len(loss_B), details=details)
    return Score(path, mean, len(loss_B), mean - half, mean + half, details)


def _batches(dataset: Dataset, samples: int, seed: int) -> Iterator[LatentBatch]:
    """The first samples of each bucket in turn, nothing dropped, until `samples` are read."""
    left = samples
    for numbers in dataset.bucket_ranges.values():
        for start in range(0, min(len(numbers), left), BATCH):
            yield dataset.read(numbers[start : min(start + BATCH, left, len(numbers))], seed=seed)
        left -= min(len(numbers), left)
