"""What the page of `eval fewstep` draws of one checkpoint: pictures of the same noise at each setting, and paths.

Shapes: B paths, T times at which a path is kept, N numbers of a latent.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.drawing.generate import ImageRequest, Sampling
from eval.drawing.pictures import write_picture
from eval.judging.metric import Prompt
from eval.measure import Subject
from eval.studies.fewstep_figures import TOLERANCE, hash_texts, make_requests
from infra import storage
from infra.codec import to_json
from model.diffusion.flow import get_formulation
from model.diffusion.grids import integrates_over_sigma
from model.diffusion.sampler import add_guidance, compute_path_slope, integrate_adaptive

KEPT = 33  # times at which a drawn path is kept
FOLDER = "fewstep"  # below the run
SHEET_VERSION = 1


@dataclass(frozen=True)
class DrawnFlow:
    """Paths of one guidance in the plane of their straight way: `along` it (0 noise, 1 data) and `aside` of it, both in
    its lengths; one list of KEPT numbers for each path, at equal steps of t."""

    guidance: float
    along: list[list[float]]
    aside: list[list[float]]


@dataclass(frozen=True)
class FewStepSheet:
    """What the page draws of one checkpoint. The picture beside it has a row of tiles for each setting (steps,
    guidance), a column for each prompt."""

    version: int
    run: str
    images_seen: int
    weights: str
    """sha256 of the weights' file"""
    student: dict[str, Any]
    """what the weights say about few steps; empty for a teacher"""
    protocol: str
    prompts: list[str]
    settings: list[tuple[int, float]]
    tile: tuple[int, int]
    """width and height"""
    flows: list[DrawnFlow]


def keep_sheet(subject: Subject, prompts: Sequence[Prompt], samplings: Sequence[Sampling], *, flows: bool) -> None:
    """Write RUN/fewstep/NAME.json and .png unless they are there; prompts and settings are part of the name.

    The picture has a row for each of `samplings`, a column for each prompt. `flows`: draw the paths too.
    """
    stated = [SHEET_VERSION, hash_texts(prompts), [sampling.protocol() for sampling in samplings]]
    protocol = hashlib.sha256(json.dumps(stated).encode()).hexdigest()[:16]
    stem = storage.join(subject.run_uri, FOLDER, f"{protocol}-{subject.recipe_hash}-{subject.images_seen}")
    if storage.exists(f"{stem}.json"):
        return
    requests = make_requests(prompts)
    rows = [[image for _, image in subject.painter.paint(requests, sampling)] for sampling in samplings]
    height, width = rows[0][0].shape[:2]
    write_picture(f"{stem}.png", np.concatenate([np.concatenate(row, axis=1) for row in rows]))
    sheet = FewStepSheet(
        SHEET_VERSION, subject.run, subject.images_seen, _hash_file(subject.weights),
        dict(subject.painter.meta.get("few_step") or {}), protocol, [prompt.text for prompt in prompts],
        [(sampling.steps, sampling.guidance) for sampling in samplings], (width, height),
        [draw_flow(subject, requests, one) for one in {s.guidance: s for s in samplings}.values()] if flows else [],
    )  # fmt: skip
    storage.write_bytes(f"{stem}.json", (json.dumps(to_json(sheet, finite=True)) + "\n").encode())


def _hash_file(weights: str) -> str:
    """As couplings name their teacher."""
    with storage.localize(weights).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def draw_flow(subject: Subject, requests: Sequence[ImageRequest], sampling: Sampling) -> DrawnFlow:
    """The exact paths of these pictures; none for a formulation that is not integrated over t."""
    form = get_formulation(subject.painter.meta["formulation"])
    if integrates_over_sigma(form):
        return DrawnFlow(sampling.guidance, [], [])
    inputs = subject.painter.prepare(requests, sampling)
    predict = add_guidance(subject.painter.model, inputs.text, inputs.unconditional, sampling.guidance)
    t_T = torch.linspace(1, 0, KEPT, dtype=torch.float64)
    with torch.no_grad():
        states = integrate_adaptive(
            lambda y, at: compute_path_slope(form, predict, y, at), inputs.noise_BCHW, t_T, tolerance=TOLERANCE
        )
    along_BT, aside_BT = project_paths(torch.stack(states, dim=1).flatten(2).double().cpu())
    return DrawnFlow(sampling.guidance, along_BT.tolist(), aside_BT.tolist())


def project_paths(path_BTN: Tensor) -> tuple[Tensor, Tensor]:
    """(along, aside), B x T: the part of a path along the way from its first to its last state, and the part in the one
    direction across in which it leaves this way most. Both in lengths of the way; the largest `aside` is positive."""
    moved_BTN = path_BTN - path_BTN[:, :1]
    way_BN = moved_BTN[:, -1]
    squared_B1 = way_BN.square().sum(1, keepdim=True).clamp(min=1e-24)  # untrained weights go nowhere
    along_BT = torch.einsum("btn,bn->bt", moved_BTN, way_BN) / squared_B1
    across_BTN = moved_BTN - along_BT[..., None] * way_BN[:, None]
    direction_BN = torch.linalg.svd(across_BTN, full_matrices=False).Vh[:, 0]
    aside_BT = torch.einsum("btn,bn->bt", across_BTN, direction_BN) / squared_B1.sqrt()
    largest_B1 = aside_BT.gather(1, aside_BT.abs().argmax(1, keepdim=True))
    return along_BT, aside_BT * torch.where(largest_B1 < 0, -1.0, 1.0)
