"""Everything that can be refused before any work: data against recipe, shapes, divisibility, an existing run folder."""

import contextlib
import dataclasses
import itertools
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch

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
from trainer.zero.group import PORT_IN_USE, Group
from trainer.zero.rankfile import file_hash

# An explicit --resume PATH may change these: one run at constant rate serves several horizons.
MAY_CHANGE = ("images", "schedule.", "optimizer.")


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
    get_protocol(recipe.validation.protocol, get_formulation(recipe.formulation))
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


def check_launch() -> None:
    """What the launchers let pass: DeepSpeed goes on with this machine alone where it does not find its hostfile."""
    for parent in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            words = parent.cmdline()
            given = [b for a, b in itertools.pairwise(words) if a == "--hostfile"]
            given += [word.partition("=")[2] for word in words if word.startswith("--hostfile=")]
            for path in given:
                if not os.path.isfile(os.path.join(parent.cwd(), path)):
                    raise UserError(
                        f"--hostfile {path}: no such file; without it DeepSpeed trains on this machine alone: "
                        "correct the path, or leave --hostfile out"
                    )


def check_port() -> None:
    """Will rank 0 be able to open the port where the ranks meet? torchrun holds it itself."""
    port = int(os.environ.get("MASTER_PORT", "0"))
    if not port or os.environ.get("RANK", "0") != "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(PORT_IN_USE.format(port=port)) from error


def own_first(out: str, resume: str) -> str:
    """The same command continues a run: once it has checkpoints of its own they count, not the one it branched from."""
    if resume in ("latest", "none") or not checkpoint.candidates(storage.join(out, "checkpoints")):
        return resume
    return "latest"


def check_run_folder(recipe: Recipe, out: str, resume: str, *, thorough: bool = False) -> str:
    """An existing run continues only with the recipe that it was started with. Where it would continue, in words;
    `thorough` reads every byte of that checkpoint, as the run itself does before its first step."""
    uri, root = storage.join(out, "recipe.json"), storage.join(out, "checkpoints")
    folders = checkpoint.candidates(root) if storage.exists(root) else []
    if resume == "none" and folders:
        raise UserError(f"{out} holds checkpoints and --resume is none: choose another --out, or remove that folder")
    if folders and storage.exists(uri):
        try:
            old = Recipe.from_json(json.loads(storage.read_bytes(uri)))
        except ValueError as error:
            raise UserError(f"{uri} cannot be read ({error}): choose another --out, or remove that folder") from error
        changed = differences(old, recipe)
        if changed:
            what = "; ".join(changed)
            raise UserError(f"{out} was started with another recipe ({what}): choose another --out or the same options")
    if resume not in ("latest", "none"):
        if not storage.exists(storage.join(resume, checkpoint.MANIFEST)):
            raise UserError(
                f"--resume {resume}: no checkpoint there; give latest, none, or a folder RUN/checkpoints/step_..."
            )
        folders = [resume]
    if not folders or not thorough:
        return ""
    alone = Group(0, 1, torch.device("cpu"))
    if resume == "latest":
        found = checkpoint.find(root, alone)
        assert found is not None
    else:
        found = checkpoint.whole(resume, alone)
    same_recipe(found.uri, found.state, recipe, resume=resume)
    return f"{found.uri} is whole: the run continues at {found.state['images_seen']:,} images"


def same_recipe(uri: str, kept: dict[str, Any], recipe: Recipe, *, resume: str) -> None:
    """Refuse a checkpoint of another recipe; what --resume PATH may change is left aside."""
    changed = differences(Recipe.from_json(kept["recipe"]), recipe)
    if resume != "latest":
        changed = [line for line in changed if not line.startswith(MAY_CHANGE)]
    if any(line.startswith("model.") for line in changed):
        raise UserError(f"{uri} is of another architecture ({'; '.join(changed)}): use the options it was saved with")
    if changed:
        raise UserError(f"{uri} belongs to another recipe ({'; '.join(changed)}): use the options it was saved with")
