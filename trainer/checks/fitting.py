"""Does this data set fit this recipe? Each mismatch with the flag that mends it, from dataset.json and the index."""

from collections.abc import Iterator
from typing import Any

from data_pipeline.flow.plan_mismatch import describe_mismatches, find_mismatches
from data_pipeline.formats.schema import read_dataset_info
from data_pipeline.loading.loader import Dataset
from data_pipeline.selection.choice import TrainedOn, TrainedPart, list_changes
from infra import storage
from infra.errors import UserError, UserErrors
from trainer.feed import choose_caption_weights
from trainer.objective import get_objective
from trainer.recipe import Recipe
from trainer.runfolder import DATA, read_trained_on

ROOM = 2.0  # times a data set's resolution squared; data_pipeline/stages/buckets.py makes nearly equal areas


def check_data(recipe: Recipe, dataset: Dataset) -> None:
    """Latents, text and captions of the data against what the model reads, all mismatches at once."""
    wrong = [*_compare_shapes(recipe, dataset), *_check_buckets(recipe, dataset), *_check_captions(recipe, dataset)]
    wanted, found = recipe.data.fingerprint, dataset.fingerprint
    if wanted not in (None, found):
        difference = f"fingerprint {found}, recipe {recipe.name} was made for {wanted}: use the data it was made for"
        wrong.append(f"{dataset.uri}: {difference}")
    if wrong:
        raise UserErrors(wrong)


def _compare_shapes(recipe: Recipe, dataset: Dataset) -> Iterator[str]:
    model, spec, vae = recipe.model, dataset.text_spec, dataset.vae
    side = dataset.resolution // vae.factor
    pairs: tuple[tuple[str, Any, Any, str], ...] = (
        ("pixels", dataset.resolution, recipe.data.resolution, "--data.resolution"),
        ("latent channels", vae.channels, model.in_channels, "--model.in-channels"),
        ("latent shape", (vae.channels, side, side), recipe.data.latent_shape, "--data.latent-shape"),
        ("text width", spec.context_width, model.context_width, "--model.context-width"),
        ("pooled text width", spec.pooled_width, model.pooled_width, "--model.pooled-width"),
        ("text tokens", spec.context_tokens, recipe.data.text_tokens, "--data.text-tokens"),
    )
    differ = [pair for pair in pairs if pair[1] != pair[2]]
    if differ:
        wrong = [
            f"{what}: data {_format_plain(a)}, recipe {_format_plain(b)} ({flag} {_format_plain(a)})"
            for what, a, b, flag in differ
        ]
        texts = [f"text_{encoder.seat}" for encoder in spec.encoders]
        columns = dict.fromkeys(name for what, *_ in differ for name in (texts if "text" in what else ["latents"]))
        yield (
            f"{dataset.uri} does not fit recipe {recipe.name}: {'; '.join(wrong)}: use the data the recipe was made "
            f"for, give these flags, or rebuild columns {', '.join(columns)} of the data"
        )


def _check_buckets(recipe: Recipe, dataset: Dataset) -> Iterator[str]:
    """Latents that patches and positions cannot cover, and those that memory was not planned for."""
    model, uri = recipe.model, dataset.uri
    if dataset.num_samples == 0:
        yield f"{uri}: the {dataset.split} split is empty: run the pipeline on more images"
    planned = (dataset.resolution // dataset.vae.factor) ** 2
    for bucket, count in dataset.buckets.items():
        _, height, width = dataset.latent_shape(bucket)
        if height % model.patch or width % model.patch or max(height, width) > model.pos_max * model.patch:
            yield (
                f"{uri}: bucket {bucket} ({count} images) has latents of {height}x{width}, which patch {model.patch} "
                f"and positions up to {model.pos_max} cannot cover: raise --model.pos-max or drop the bucket"
            )
        if height * width > ROOM * planned:
            yield (
                f"{uri}: bucket {bucket} ({count} images) has latents of {height}x{width}, more than {ROOM:g} "
                f"times the {planned} that the recipe is planned for: drop the bucket, or pack it as another resolution"
            )


def _check_captions(recipe: Recipe, dataset: Dataset) -> Iterator[str]:
    if not choose_caption_weights(recipe.data, dataset):
        yield f"{dataset.uri} has captions {', '.join(dataset.info.captions)} only: set --data.original-captions"


def check_made_alike(dataset: Dataset, run: str) -> None:
    """Data that was made anew, by other settings, since a run began with it: which column, and what changed."""
    if not storage.exists(storage.join(run, DATA)):
        return
    found = find_mismatches(dataset.info, read_dataset_info(run, DATA))
    if found:
        raise UserError(
            f"{dataset.uri} does not fit the run {run}: {describe_mismatches(found)}: make these columns anew as "
            f"the run asks (`python -m data_pipeline run PLAN ... --rebuild {' '.join(found)}`), or begin another run"
        )


def check_same_choice(chosen: TrainedOn, run: str, *, plain: bool) -> bool:
    """UserError where a run was begun with another mix or filter: what changed. What a dataset itself became is told
    by its fingerprint."""
    begun = read_trained_on(run)
    if begun is None and plain:
        return True
    if begun is None:  # all of one dataset
        if not storage.exists(storage.join(run, DATA)):
            return True
        info = read_dataset_info(run, DATA)
        begun = TrainedOn({next(iter(chosen.parts)): TrainedPart("", info, "1", "")}, (), (), max_repeats=None)
    changed = list_changes(begun, chosen)
    if changed:
        raise UserError(
            f"{run} was begun with other data ({'; '.join(changed)}): use what it was begun with, choose another "
            "--out, or give --allow-other-data"
        )
    return True


def check_mix(recipe: Recipe, dataset: Dataset) -> None:
    """What a mix cannot do, and whether it lasts for the whole run."""
    if get_objective(recipe.objective).pairs:
        raise UserError(f"recipe {recipe.name}: preference pairs are not mixed: give --data one dataset of pairs")
    if recipe.steps > 0 and recipe.global_batch > 0:
        dataset.order(seed=recipe.seed, global_batch=recipe.global_batch).batch(recipe.steps - 1)


def check_val(recipe: Recipe, val: Dataset) -> None:
    """What validation needs."""
    if val.num_samples == 0:
        raise UserError(f"{val.uri}: split {val.split!r} is empty; use --validation.every None to train without")


def _format_plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
