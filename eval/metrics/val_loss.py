"""Validation loss of exported weights, from the file alone: the samples, noise and protocol hash that the trainer uses.

The trainer writes these rows while it trains; here they are made where it did not, or to check it.
"""

import hashlib
import json
import math

import torch

from data_pipeline.loading.loader import Dataset, open_dataset
from eval.drawing.generate import Painter
from eval.judging.metric import Kept, Score
from infra.errors import UserError
from infra.values import one_per_sample
from model.diffusion.flow import get_formulation
from model.diffusion.validation import get_protocol, half_interval, validation_losses

SAMPLES, BATCH, SEED = 2048, 32, 0  # the trainer's defaults


def val_loss(
    painter: Painter, data: str, *, protocol: str = "sd3", samples: int = SAMPLES
) -> tuple[list[Score], str, Kept]:
    """Scores `sd3` (the protocol's mean) and `sd3/t0.125` ... (one per noise level), their protocol hash, and what each
    sample lost."""
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
    found = chosen.by_sample(protocol, losses_BV)
    scores = [_score(name if name == protocol else f"{protocol}/{name}", loss_B) for name, loss_B in found.items()]
    told = [
        protocol, get_protocol(protocol).levels, len(losses_BV), SEED, painter.meta["formulation"], dataset.fingerprint
    ]  # fmt: skip
    kept = one_per_sample({name: loss_B.numpy() for name, loss_B in found.items()})
    return scores, hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16], kept


def fixed_batches(dataset: Dataset, samples: int) -> list[range]:
    """The first samples, evenly from the buckets, never two buckets in one batch (as the trainer's validation)."""
    found: list[range] = []
    wanted = min(samples, dataset.num_samples)
    for numbers in dataset.bucket_ranges.values():
        share = numbers[: math.ceil(wanted * len(numbers) / dataset.num_samples)]
        found += [share[i : i + BATCH] for i in range(0, len(share), BATCH)]
    return found


def _score(path: str, loss_B: torch.Tensor) -> Score:
    """Mean over samples with its interval."""
    mean, half = loss_B.mean().item(), half_interval(loss_B)
    ends = (None, None) if half is None else (mean - half, mean + half)
    return Score(path, mean, len(loss_B), *ends)
