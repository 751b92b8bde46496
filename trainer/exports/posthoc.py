"""Post-hoc EMA: an average of any width out of the averages that a run stored (EDM2, arXiv 2312.02696, section 3.2).

An average is the integral of the weights under its profile. Weights are linear in profiles, so the combination of
stored profiles that is nearest to a wished one gives nearly its average, without training again.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.checkpoints import find_weights
from infra import storage
from infra.errors import UserError
from infra.log import get_logger
from model.backbone import read_config
from model.files.weights import read_meta
from trainer.exports.card import Meta
from trainer.exports.export import StoredWeights, Weights, open_weights, write
from trainer.runfolder import get_checkpoints_folder
from trainer.zero.checkpoint import MANIFEST, list_checkpoints
from trainer.zero.ema import parse_profile

log = get_logger("posthoc")
POOR = 0.05  # above this error of the profile, the average is another one than was asked for


class Profile(NamedTuple):
    """A power profile over the first `images` images of a run: (gamma + 1) t^gamma / images^(gamma + 1)."""

    gamma: float
    images: float


@dataclass(frozen=True)
class StoredAverage:
    """An average that a run stored, by name of tensor."""

    profile: Profile
    read: Callable[[str], Tensor]


def compute_overlap(a: Profile, b: Profile) -> float:
    """The inner product of two profiles: the integral of their product, in 1 / images."""
    shorter = min(a.images, b.images)
    gammas = a.gamma + b.gamma + 1
    shares = (shorter / a.images) ** (a.gamma + 1) * (shorter / b.images) ** (b.gamma + 1)
    return (a.gamma + 1) * (b.gamma + 1) / gammas * shares / shorter


def combine_profiles(stored: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """(weights, error): the combination of `stored` nearest to `wanted` in the mean square, and how far off it is, as a
    share of the norm of `wanted`."""
    products = np.array([[compute_overlap(a, b) for b in stored] for a in stored]) * wanted.images
    with_wanted = np.array([compute_overlap(a, wanted) for a in stored]) * wanted.images
    weights = np.linalg.lstsq(products, with_wanted, rcond=None)[0]
    norm = compute_overlap(wanted, wanted) * wanted.images
    left = float(norm - 2 * weights @ with_wanted + weights @ products @ weights)
    return weights, float(np.sqrt(max(left, 0.0) / norm))


def find_averages(run: str) -> tuple[list[StoredAverage], Callable[[str], Tensor], Meta]:
    """Every average under a power profile that the run's exported weights and its checkpoints hold, each once; the
    tensors of the newest export, and what it says of itself."""
    found: dict[Profile, StoredAverage] = {}
    folder, newest, read = storage.join(run, "weights"), None, None
    exported = storage.list_files(folder, suffix="/ema.safetensors") if storage.exists(folder) else []
    for uri in sorted(uri for uri in exported if "/step_" in uri.removeprefix(folder)):
        newest, read = read_meta(find_weights(uri)), open_weights(uri, {})
        gamma = parse_profile(str(newest["ema_profile"])).gamma
        if gamma is not None:
            profile = Profile(gamma, float(newest["images_seen"]))
            found[profile] = StoredAverage(profile, read)
    if newest is None or read is None:
        raise UserError(f"{run}: no averages in {folder}: is this the folder of a run that has saved?")
    for uri in list_checkpoints(get_checkpoints_folder(run)):
        manifest = json.loads(storage.read_bytes(storage.join(uri, MANIFEST)))
        recipe = manifest["state"]["recipe"]
        if recipe["lora"]["rank"] is not None:
            continue  # it holds adapters alone
        for name in recipe["ema"]["profiles"]:
            gamma = parse_profile(name).gamma
            profile = Profile(gamma or 0.0, float(manifest["state"]["images_seen"]))
            if gamma is not None and profile not in found:
                found[profile] = StoredAverage(profile, StoredWeights(uri, kind="ema", profile=name))
    return list(found.values()), read, newest


def reconstruct(
    run: str, width: float, *, out: str, images: int | None = None, dtype: torch.dtype = torch.float32
) -> float:
    """Write to `out` the average of relative width `width` over the first `images` images (None: all) of a run; the
    error of its profile. One tensor is in memory at a time. UserError for a width or a run that has no such average."""
    gamma = parse_profile(f"power:{width}").gamma
    assert gamma is not None
    averages, read_newest, meta = find_averages(run)
    wanted = Profile(gamma, float(images or meta["images_seen"]))
    if wanted.images > meta["images_seen"]:
        raise UserError(f"{run} stored its last average after {meta['images_seen']:,} images: give --images up to that")
    averages = [average for average in averages if average.profile.images <= wanted.images]
    if not averages:
        raise UserError(f"{run}: no average was stored in the first {wanted.images:,.0f} images")
    weights, error = combine_profiles([average.profile for average in averages], wanted)
    with torch.device("meta"):
        model = read_config(meta["backbone"], meta["config"]).build()
    parameters = {name for name, _ in model.named_parameters()}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def read(name: str) -> Tensor:
        if name not in parameters:  # a table: the same in all
            return read_newest(name)
        total = torch.zeros(shapes[name], dtype=torch.float64)
        for weight, average in zip(weights, averages, strict=True):
            total += float(weight) * average.read(name).double()
        return total.float()

    made_of = {"averages": len(averages), "profile_error": error}
    described = meta | {"ema_profile": f"power:{width}", "images_seen": int(wanted.images), "posthoc": made_of}
    write([out], Weights(shapes, read, described), dtype=dtype)
    if error > POOR:
        log.warning(
            "%d stored averages give this profile with an error of %.0f %%: store more of them (--ema.profiles "
            "power:0.05 power:0.10, --logging.save-every, --logging.keep)", len(averages), 100 * error,
        )  # fmt: skip
    return error
