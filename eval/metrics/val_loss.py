"""Validation loss of exported weights, from the file alone: the samples, noise and protocol hash that the trainer uses.

The trainer writes these rows while it trains; here they are made where it did not, or to check it.
"""

import hashlib
import json
import math

import torch

from data_pipeline.loading.loader import Dataset, open_dataset
from eval.drawing.generate import Painter
from eval.judging.judges import Judges
from eval.judging.metric import Score, WeightsMetric
from infra.errors import UserError
from infra.values import PromptValues, tabulate_samples
from model.diffusion.flow import get_formulation
from model.diffusion.validation import compute_half_interval, compute_validation_losses, get_protocol

PROTOCOL, SAMPLES, BATCH, SEED = "sd3", 2048, 32, 0  # the trainer's defaults


class ValLoss(WeightsMetric):
    """Rows `val_loss/sd3` (the mean of the protocol's noise levels) and `val_loss/sd3/t0.125` ... (one per level)."""

    name, higher_is_better, headline = "val_loss", False, PROTOCOL

    def __init__(self, judges: Judges) -> None:
        """No judge is asked: the loss is the network's own."""

    def measure(self, painter: Painter, data: str) -> tuple[list[Score], str, PromptValues]:
        """The validation loss on the first SAMPLES of the dataset's val split, its protocol's hash, and values per
        sample. UserError if the weights were trained on another dataset."""
        dataset = _open_validation(painter, data)
        formulation = get_formulation(painter.meta["formulation"])
        chosen = get_protocol(PROTOCOL, formulation)
        parts = []
        with torch.inference_mode():
            for numbers in choose_batches(dataset, SAMPLES):
                batch = dataset.read(numbers, seed=SEED)
                batch = batch._replace(
                    latent_BCHW=batch.latent_BCHW.to(painter.device), text=batch.text.to(painter.device)
                )
                parts.append(
                    compute_validation_losses(painter.model, batch, chosen.levels, SEED, formulation=formulation)
                )
        losses_BV = torch.cat(parts)
        found = chosen.by_sample(PROTOCOL, losses_BV)
        scores = [_score(name if name == PROTOCOL else f"{PROTOCOL}/{name}", loss_B) for name, loss_B in found.items()]
        # Hashed as the trainer hashes it (trainer/validate.py): rows of both are one curve.
        stated = [
            PROTOCOL, get_protocol(PROTOCOL).levels, len(losses_BV), SEED, painter.meta["formulation"],
            dataset.fingerprint,
        ]  # fmt: skip
        kept = tabulate_samples({name: loss_B.numpy() for name, loss_B in found.items()})
        return scores, hashlib.sha256(json.dumps(stated).encode()).hexdigest()[:16], kept


def _open_validation(painter: Painter, data: str) -> Dataset:
    dataset = open_dataset(data, split="val")
    expected = painter.meta.get("data_fingerprint")
    if expected and dataset.fingerprint != expected:
        raise UserError(f"{data} is dataset {dataset.fingerprint}, but these weights were trained on {expected}")
    if dataset.num_samples == 0:
        raise UserError(f"{data}: the val split is empty, so there is no validation loss")
    return dataset


def choose_batches(dataset: Dataset, samples: int) -> list[range]:
    """The first samples, evenly from the buckets, never two buckets in one batch (as the trainer's validation)."""
    found: list[range] = []
    wanted = min(samples, dataset.num_samples)
    for numbers in dataset.bucket_ranges.values():
        share = numbers[: math.ceil(wanted * len(numbers) / dataset.num_samples)]
        found += [share[i : i + BATCH] for i in range(0, len(share), BATCH)]
    return found


def _score(path: str, loss_B: torch.Tensor) -> Score:
    """Mean over samples with its interval."""
    mean, half = loss_B.mean().item(), compute_half_interval(loss_B)
    ends = (None, None) if half is None else (mean - half, mean + half)
    return Score(path, mean, len(loss_B), *ends)
