"""Everything that can be refused before any work: data against recipe, shapes, divisibility, an existing run folder."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator

from data_pipeline.loader import Dataset, open_dataset
from data_pipeline.pairs import Partners
from infra import storage
from infra.errors import UserError
from model.errors import ModelError
from model.flow import get_formulation
from model.validation import get_protocol
from model.weights import read_meta
from trainer.recipe import Recipe, check, differences
from trainer.trackers import check_trackers
from trainer.zero import checkpoint
from trainer.zero.ema import parse_profile
from trainer.zero.rankfile import file_hash


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """What fails here fails on every rank alike: rank 0 says it, the others leave quietly, after it has spoken."""
    try:
        yield
    except (UserError, ModelError):
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)
            raise SystemExit(2) from None
        raise


def fit(recipe: Recipe, data: str, *, world: int) -> tuple[Recipe, Dataset, Dataset | None]:
    """The recipe with the data's fingerprint in it, and the data opened (train split, val split if it is wanted)."""
    check(recipe)
    check_trackers(recipe)
    get_formulation(recipe.formulation)
    get_protocol(recipe.validation.protocol)
    for profile in recipe.ema.profiles:
        parse_profile(profile)
    micro_batches(recipe, world)
    dataset = open_dataset(data)
    _check_data(recipe, dataset)
    val = open_dataset(data, split="val") if recipe.validation.every is not None else None
    if recipe.objective == "dpo":
        for split in (dataset, val):
            if split is not None:
                Partners(split)  # refuses what are no pairs
    wanted, found = recipe.data.fingerprint, dataset.fingerprint
    if wanted not in (None, found):
        raise UserError(
            f"{data}: fingerprint {found}, recipe {recipe.name} was made for {wanted}: use the data it was made for"
        )
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, fingerprint=found)), dataset, val


def micro_batches(recipe: Recipe, world: int) -> int:
    """Forward passes per rank and step."""
    share, rest = divmod(recipe.global_batch, world)
    if rest:
        raise UserError(
            f"recipe {recipe.name}: global_batch {recipe.global_batch} does not divide by {world} ranks: "
            f"use another number of ranks or --global-batch {recipe.global_batch // world * world or world}"
        )
    micro = recipe.parallel.micro_batch or share
    if share % micro:
        raise UserError(
            f"recipe {recipe.name}: micro_batch {micro} does not divide the {share} images of a rank: "
            f"use a divisor of {share}"
        )
    return share // micro


def _check_data(recipe: Recipe, dataset: Dataset) -> None:
    """Latents and text of the data against what the model reads, each mismatch with the flag that mends it."""
    model, spec, uri = recipe.model, dataset.text_spec, dataset.uri
    pairs = (
        ("pixels", dataset.resolution, recipe.data.resolution, "--data.resolution"),
        ("latent channels", dataset.vae.channels, model.in_channels, "--model.in-channels"),
        ("text width", spec.context_width, model.context_width, "--model.context-width"),
        ("pooled text width", spec.pooled_width, model.pooled_width, "--model.pooled-width"),
        ("text tokens", spec.context_tokens, recipe.data.text_tokens, "--data.text-tokens"),
    )
    wrong = [
        f"{what}: data {found}, recipe {wanted} ({flag} {found})"
        for what, found, wanted, flag in pairs
        if found != wanted
    ]
    if wrong:
        raise UserError(
            f"{uri} does not fit recipe {recipe.name}: {'; '.join(wrong)}: "
            "take the data the recipe was made for, or give these flags"
        )
    if dataset.num_samples == 0:
        raise UserError(f"{uri}: the train split is empty: run the pipeline on more images")
    for bucket, count in dataset.buckets.items():
        _, height, width = dataset.latent_shape(bucket)
        if height % model.patch or width % model.patch or max(height, width) > model.pos_max * model.patch:
            raise UserError(
                f"{uri}: bucket {bucket} ({count} images) has latents of {height}x{width}, which patch {model.patch} "
                f"and positions up to {model.pos_max} cannot cover: raise --model.pos-max or drop the bucket"
            )


def with_init(recipe: Recipe, init_from: str | None) -> Recipe:
    """The recipe that starts from a weights file; refused when that file is for another model."""
    if init_from is None:
        if recipe.lora.rank is not None:
            raise UserError(
                f"recipe {recipe.name} trains adapters on frozen weights: give --init-from RUN/weights/ema.safetensors"
            )
        return recipe
    path = storage.localize(init_from)
    meta = read_meta(path)
    wanted = recipe.model.to_json()
    # Positions are a formula, and QK-norm may be added to weights without it (paper, section 5.3.2).
    free = {"norm_backend"} | {key for key in wanted if key.startswith("pos_")}
    found = {"backbone": meta["backbone"]} | meta["config"]
    wrong = [
        f"{key}: weights {found.get(key)}, recipe {value}"
        for key, value in ({"backbone": recipe.model.name} | wanted).items()
        if key not in free and found.get(key) != value and not (key == "qk_norm" and value)
    ]
    if wrong:
        raise UserError(f"{init_from} is for another model than recipe {recipe.name}: {'; '.join(wrong)}")
    return dataclasses.replace(recipe, init_weights=file_hash(str(path)))


def check_run_folder(recipe: Recipe, out: str, resume: str) -> None:
    """An existing run continues only with the recipe that it was started with."""
    uri = storage.join(out, "recipe.json")
    started = storage.exists(storage.join(out, "checkpoints"))
    if resume == "none" and started and checkpoint.candidates(storage.join(out, "checkpoints")):
        raise UserError(f"{out} holds checkpoints and --resume is none: choose another --out, or remove that folder")
    if resume not in ("latest", "none") and not storage.exists(storage.join(resume, checkpoint.MANIFEST)):
        raise UserError(
            f"--resume {resume}: no checkpoint there; give latest, none, or a folder RUN/checkpoints/step_..."
        )
    if not storage.exists(uri) or not started:
        return
    try:
        old = Recipe.from_json(json.loads(storage.read_bytes(uri)))
    except ValueError as error:
        raise UserError(f"{uri} cannot be read ({error}): choose another --out, or remove that folder") from error
    changed = differences(old, recipe)
    if changed:
        raise UserError(
            f"{out} was started with another recipe ({'; '.join(changed)}): choose another --out, or the same options"
        )
