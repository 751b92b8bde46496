"""Validation loss of exported weights, from the file alone: the samples, noise and protocol hash that the trainer uses.

The trainer writes these rows while it trains; here they are made where it did not, or to check it.
"""

import hashlib
import json
import math

import torch

from data_pipeline.loader import Dataset, open_dataset
from eval.generate import Painter
from eval.metric import Score
from infra.errors import UserError
from model.flow import get_formulation
from model.validation import get_protocol, validation_losses

SAMPLES, BATCH, SEED = 2048, 32, 0  # the trainer's defaults


def val_loss(painter: Painter, data: str, *, protocol: str = "sd3", samples: int = SAMPLES) -> tuple[list[Score], str]:
    """Scores `sd3` (the protocol's mean) and `sd3/t0.125` ... (one per noise level), and their protocol hash."""
    dataset = open_dataset(data, split="val")
    expected = painter.meta.get("data_fingerprint")
    if expected and dataset.fingerprint != expected:
        raise UserError(f"{data} is dataset {dataset.fingerprint}, but these weights were trained on {expected}")
    if dataset.num_samples == 0:
        raise UserError(f"{data}: the val split is empty, so there is no validation loss")
    formulation = get_formulation(painter.meta["formulation"])
    chosen = get_protocol(protocol, formulation)
    parts = []
    with torch.inference_mode():
        for numbers in fixed_batches(dataset, samples):
            batch = dataset.read(numbers, seed=SEED)
            batch = batch._replace(latent_BCHW=batch.latent_BCHW.to(painter.device), text=batch.text.to(painter.device))
            parts.append(validation_losses(painter.model, batch, chosen.levels, SEED, formulation=formulation))
    losses_BV = torch.cat(parts)
    scores = [_score(protocol, losses_BV[:, : chosen.averaged].mean(1))]
    scores += [_score(f"{protocol}/t{level:.3f}", losses_BV[:, k]) for k, level in enumerate(chosen.levels)]
    told = [
        protocol, get_protocol(protocol).levels, len(losses_BV), SEED, painter.meta["formulation"], dataset.fingerprint
    ]  # fmt: skip
    return scores, hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def fixed_batches(dataset: Dataset, samples: int) -> list[range]:
    """The first samples, evenly from the buckets, never two buckets in one batch (as the trainer's validation)."""
    found: list[range] = []
    wanted = min(samples, dataset.num_samples)
    for numbers in dataset.bucket_ranges.values():
        share = numbers[: math.ceil(wanted * len(numbers) / dataset.num_samples)]
        found += [share[i : i + BATCH] for i in range(0, len(share), BATCH)]
    return found


def _score(path: str, loss_B: torch.Tensor) -> Score:
    """Mean over samples with a normal 95 % interval."""
    mean = loss_B.mean().item()
    if len(loss_B) < 2:
        return Score(path, mean, len(loss_B))
    half = 1.96 * loss_B.std().item() / len(loss_B) ** 0.5
    return Score(path, mean, len(loss_B), mean - half, mean + half)
