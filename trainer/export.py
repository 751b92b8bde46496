"""From shares to one safetensors file: raw or EMA weights, tensor by tensor, with metadata that names their origin."""

import dataclasses
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.checkpoints import resolve
from data_pipeline.schema import DatasetInfo
from infra import storage
from infra.errors import UserError
from infra.log import get_logger
from infra.results import ResultStore
from infra.version import code_version
from model.convert import convert
from model.errors import ModelError
from model.lora import merging
from model.weights import META_KEY, expected_tensors, read_meta
from trainer.recipe import Recipe
from trainer.zero import checkpoint
from trainer.zero.engine import ZeroEngine
from trainer.zero.group import Group
from trainer.zero.partition import Segment
from trainer.zero.rankfile import Ranges, copy_ranges, file_hash, put

log = get_logger("export")
Meta = dict[str, Any]


def weights_meta(recipe: Recipe, info: DatasetInfo, *, kind: str, images_seen: int, run: str) -> dict[str, Any]:
    """What a weights file says about itself: enough to sample from it and to trace it."""
    return {
        "kind": kind,
        "backbone": recipe.model.name,
        "config": recipe.model.to_json(),
        "formulation": recipe.formulation,
        "shift": recipe.shift,
        "text_spec": info.text_spec.to_json(),
        "vae": dataclasses.asdict(info.vae),
        "resolution": info.resolution,
        "recipe": recipe.name,
        "recipe_hash": recipe.hash,
        "data_fingerprint": info.fingerprint,
        "images_seen": images_seen,
        "code_version": code_version(),
        "run": run,
        "ema_profile": recipe.ema.profiles[0] if kind == "ema" else None,
    }


def weights_reader(uri: str, shapes: Mapping[str, tuple[int, ...]]) -> Callable[[str], Tensor]:
    """Tensors of a weights file by name; QK-norms that it lacks are ones."""
    from safetensors import safe_open

    file: Any = safe_open(str(storage.localize(uri)), framework="pt")
    names = set(file.keys())

    def read(name: str) -> Tensor:
        if name not in names and name.rsplit(".", 2)[-2] in ("norm_q", "norm_k"):
            return torch.ones(shapes[name])
        return file.get_tensor(name)

    return read


def export(
    engine: ZeroEngine, tensors: list[Tensor], uris: list[str], meta: dict[str, Any], group: Group,
    *, base: str | None = None,
) -> bool:  # fmt: skip
    """Write the weights whose shares are `tensors` to every URI; False when that failed. Collective.

    One tensor after the other is put together and written: no rank ever holds more than one. Under adapters `base` is
    the file of the frozen weights; adapters are merged into its tensors.
    """
    problem = ""
    asked = iter(engine.trained)  # in the order in which `write` asks: that of the network's layers
    if group.rank == 0:
        recipe = engine.recipe
        known = engine.shapes | engine.trained
        buffers = {n: b.cpu() for n, b in engine.model.state_dict().items() if n not in known}
        shapes = engine.shapes | {n: tuple(b.shape) for n, b in buffers.items()}

        def trained(name: str) -> Tensor:
            return engine.whole(next(asked), tensors)

        whole: Callable[[str], Tensor] = trained

        def read(name: str) -> Tensor:
            return buffers[name] if name in buffers else whole(name)

        try:
            if recipe.lora.rank is not None:
                assert base is not None, "a run with adapters keeps the file of its frozen weights"
                scale = recipe.lora_alpha / recipe.lora.rank
                whole = merging(weights_reader(base, engine.shapes), trained, engine.trained, scale=scale)
            write(uris, shapes, read, meta)
        except (UserError, ModelError, OSError) as error:
            problem = str(error)
            log.warning("weights not exported: %s", problem)
    for name in asked:  # the other ranks, and rank 0 after a failure: whatever happens, all take part in each gather
        engine.whole(name, tensors)
    return not group.any(bool(problem))


def write(uris: list[str], shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor], meta: Meta) -> None:
    """One safetensors file at every URI, the tensors asked for in the order of `shapes`, each checked."""
    put(uris[0], _pieces(uris[0], shapes, read, meta))
    for uri in uris[1:]:
        _copy(uris[0], uri)


def _pieces(
    uri: str, shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor], meta: Meta
) -> Iterator[bytes | memoryview]:
    expected = {name: tuple(x.shape) for name, x in expected_tensors(meta).items()}
    if expected != shapes:
        wrong = sorted({n for n in expected.keys() | shapes.keys() if expected.get(n) != shapes.get(n)})
        raise ModelError(f"{uri}: {len(wrong)} tensors do not fit the model ({', '.join(wrong[:4])} ...)")
    yield from stream(uri, shapes, read, meta)


def stream(
    uri: str, shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor], meta: Meta
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, each tensor checked."""
    header: dict[str, Any] = {"__metadata__": {META_KEY: json.dumps(meta), "format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        nbytes = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name, shape in shapes.items():
        tensor = read(name).detach().to("cpu", torch.float32).contiguous()
        if tuple(tensor.shape) != shape or not torch.isfinite(tensor).all():
            raise ModelError(f"{uri}: {name} is {tuple(tensor.shape)} or not finite, expected finite {shape}")
        yield tensor.reshape(-1).numpy().data.cast("B")


def _copy(source: str, target: str) -> None:
    """A second name for the same content: a hard link where the file system has them."""
    if storage.is_remote(target):
        with storage.open_read(source) as file:
            put(target, iter(lambda: file.read(storage.READ_AHEAD), b""))
        return
    here, there = storage.local_path(source), storage.local_path(target)
    there.parent.mkdir(parents=True, exist_ok=True)
    temp = there.with_name(f".{uuid.uuid4().hex}{storage.TEMP_SUFFIX}")
    try:
        try:
            os.link(here, temp)
        except OSError:
            shutil.copyfile(here, temp)
        temp.replace(there)
    finally:
        temp.unlink(missing_ok=True)


class StoredWeights:
    """What a checkpoint on disk or S3 holds, tensor by tensor, without DeepSpeed and on one process."""

    def __init__(self, folder: str, *, kind: str, profile: str | None) -> None:
        found, reason = checkpoint.inspect(folder, Group(0, 1, torch.device("cpu")))
        if found is None:
            raise UserError(f"{folder}: not a whole checkpoint ({reason})")
        self.recipe = Recipe.from_json(found.state["recipe"])
        self.images_seen = int(found.state["images_seen"])
        self._name = "master" if kind == "raw" else f"ema/{profile or self.recipe.ema.profiles[0]}"
        self._ranges = Ranges(found.uri, len(found.manifest["files"]))
        self.shapes = self._ranges.shapes

    def __call__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise UserError(f"{self._ranges.folder}: holds no {name!r}; it is a checkpoint of another architecture")
        shape = self.shapes[name]
        flat = torch.empty(torch.Size(shape).numel())
        copy_ranges(self._ranges, [(Segment(name, shape, 0, flat.numel(), 0),)], {self._name: [flat]})
        return flat.view(shape)


def export_checkpoint(
    folder: str, *, kind: str, profile: str | None, info: DatasetInfo, run: str, out: str, base: str | None = None
) -> int:
    """Whole weights from a checkpoint, adapters merged into `base`; the number of parameters."""
    stored = StoredWeights(folder, kind=kind, profile=profile)
    recipe = stored.recipe
    with torch.device("meta"):
        shapes = {name: tuple(param.shape) for name, param in recipe.model.build().named_parameters()}
    whole: Callable[[str], Tensor] = stored
    if recipe.lora.rank is not None:
        scale = recipe.lora_alpha / recipe.lora.rank
        whole = merging(weights_reader(base_of(recipe, base), shapes), stored, stored.shapes, scale=scale)
    elif base is not None:
        raise UserError(f"{folder}: this run trained all of its weights, there is nothing to merge: leave --base out")
    made = recipe.model.build().state_dict() if recipe.model.pos_stored else {}
    buffers = {n: b for n, b in made.items() if n not in shapes}

    def read(n: str) -> Tensor:
        return buffers[n] if n in buffers else whole(n)

    meta = weights_meta(recipe, info, kind=kind, images_seen=stored.images_seen, run=run)
    if kind == "ema" and profile:
        meta["ema_profile"] = profile
    write([out], shapes | {n: tuple(b.shape) for n, b in buffers.items()}, read, meta)
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def base_of(recipe: Recipe, base: str | None) -> str:
    """The file of the frozen weights; UserError when it is not the one that the run started from."""
    if base is None:
        raise UserError("this run trained adapters: give --base, the weights it started from, or --lora adapter")
    if file_hash(base) != recipe.init_weights:
        raise UserError(f"{base} is not the file that the run started from (sha256 {recipe.init_weights})")
    return base


def export_as(
    to: str, folder: str, *, kind: str, profile: str | None, info: DatasetInfo, run: str, out: str,
    base: str | None = None,
) -> int:  # fmt: skip
    """A checkpoint as our file, as one file with SD3's names, or as a diffusers folder; the number of parameters."""
    name = run.rstrip("/").rsplit("/", 1)[-1]
    if to == "beeline":
        count = export_checkpoint(folder, kind=kind, profile=profile, info=info, run=name, out=out, base=base)
        card = model_card(run, read_meta(storage.localize(out)), file=out.rsplit("/", 1)[-1])
        storage.write_bytes(f"{out}.md", card.encode())
        return count
    if storage.is_remote(out):
        raise UserError(f"{out}: give a local folder; the diffusers library writes there")
    with tempfile.TemporaryDirectory(dir=storage.local_path(out).absolute().parent) as temp:
        ours = Path(temp) / "ours.safetensors"
        count = export_checkpoint(folder, kind=kind, profile=profile, info=info, run=name, out=str(ours), base=base)
        meta = read_meta(ours)
        target = storage.local_path(out)
        if to == "sd3":
            convert(ours, target, to="sd3")
            target.with_name(f"{target.name}.md").write_text(model_card(run, meta, file=target.name))
        else:
            convert(ours, target, to="diffusers", vae=resolve(info.vae.checkpoint))
            card = (target / "README.md").read_text()
            (target / "README.md").write_text(card + "\n" + figures(run))
    return count


def model_card(run: str, meta: Meta, *, file: str) -> str:
    """What the weights are, where they come from, what they reached."""
    facts = [f"- {key}: {value}" for key, value in meta.items() if key not in ("config", "text_spec", "vae")]
    config = ", ".join(f"{key} {value}" for key, value in meta["config"].items())
    head = ["---", "tags: [text-to-image, rectified-flow]", "---", f"# {meta['run']}: {file}", ""]
    return "\n".join([*head, *facts, f"- model: {config}", "", figures(run)])


def figures(run: str) -> str:
    """The last value of every figure in the run's results, as a table."""
    rows = {row.metric: row for row in ResultStore(storage.join(run, "results")).rows()}
    kept = [row for name, row in sorted(rows.items()) if not name.startswith("cost/bytes") and "/t" not in name]
    if not kept:
        return "No figures were written for this run yet.\n"
    lines = [f"| {r.metric} | {r.value:.6g} | {r.images_seen:,} | {r.sample_count:,} |" for r in kept]
    return "\n".join(["| figure | value | at images | samples |", "|---|---|---|---|", *lines]) + "\n"
