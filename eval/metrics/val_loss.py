"""Validation loss of exported weights, from the file alone: the samples, noise and protocol hash that the trainer uses.

The trainer writes these rows while it trains; here they are made where it did not, or to check it.
"""

import torch

from data_pipeline.loading.loader import Dataset, open_dataset
from eval.drawing.generate import Painter
from eval.judging.judges import Judges
from eval.judging.metric import Score, WeightsMetric
from infra.errors import UserError
from infra.values import PromptValues, tabulate_samples
from model.diffusion.flow import get_formulation
from model.diffusion.validation import ValSettings, compute_half_interval, compute_validation_losses, get_protocol

SETTINGS = ValSettings()


class ValLoss(WeightsMetric):
    """Rows `val_loss/sd3` (the mean of the protocol's noise levels) and `val_loss/sd3/t0.125` ... (one per level)."""

    name, higher_is_better, headline = "val_loss", False, SETTINGS.protocol

    def __init__(self, judges: Judges) -> None:
        """No judge is asked: the loss is the network's own."""

    def measure(self, painter: Painter, data: str) -> tuple[list[Score], str, PromptValues]:
        """The validation loss on the first samples of the dataset's val split, its protocol's hash, and values per
        sample. UserError if the weights were trained on another dataset."""
        dataset, protocol, seed = _open_validation(painter, data), SETTINGS.protocol, SETTINGS.seed
        formulation = get_formulation(painter.meta["formulation"])
        chosen = get_protocol(protocol, formulation)
        parts = []
        with torch.inference_mode():
            for numbers in dataset.cut_batches(SETTINGS.samples, size=SETTINGS.batch):
                batch = dataset.read(numbers, seed=seed)
                batch = batch._replace(
                    latent_BCHW=batch.latent_BCHW.to(painter.device), text=batch.text.to(painter.device)
                )
                parts.append(
                    compute_validation_losses(painter.model, batch, chosen.levels, seed, formulation=formulation)
                )
        losses_BV = torch.cat(parts)
        by_path = chosen.by_sample(protocol, losses_BV)
        scores = [
            _score(path if path == protocol else f"{protocol}/{path}", loss_B) for path, loss_B in by_path.items()
        ]
        protocol_hash = SETTINGS.hash(
            samples=len(losses_BV), formulation=painter.meta["formulation"], fingerprint=dataset.fingerprint
        )
        return scores, protocol_hash, tabulate_samples({path: loss_B.numpy() for path, loss_B in by_path.items()})


def _open_validation(painter: Painter, data: str) -> Dataset:
    dataset = open_dataset(data, split="val")
    expected = painter.meta.get("data_fingerprint")
    if expected and dataset.fingerprint != expected:
        raise UserError(f"{data} is dataset {dataset.fingerprint}, but these weights were trained on {expected}")
    if dataset.num_samples == 0:
        raise UserError(f"{data}: the val split is empty, so there is no validation loss")
    return dataset


def _score(path: str, loss_B: torch.Tensor) -> Score:
    """Mean over samples with its interval."""
    mean, half = loss_B.mean().item(), compute_half_interval(loss_B)
    ends = (None, None) if half is None else (mean - half, mean + half)
    return Score(path, mean, len(loss_B), *ends)
