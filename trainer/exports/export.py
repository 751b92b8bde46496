"""From shares to one safetensors file: raw or EMA weights, tensor by tensor, with metadata that names their origin."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.checkpoints import find_weights, resolve
from data_pipeline.formats.schema import DatasetInfo
from infra import storage
from infra.errors import UserError
from infra.log import get_logger
from model.backbone import read_config
from model.backbones.mmdit import MMDiTConfig
from model.files.convert import check_target
from model.files.names import POSITIONS, make_position_table, to_sd3
from model.files.pipeline import TRANSFORMER, write_pipeline
from model.files.weights import META_KEY, list_expected_tensors
from model.lora import merge_when_read
from trainer.exports.card import Meta, describe_weights, format_figures, format_model_card
from trainer.recipe import Recipe
from trainer.runfolder import name_run
from trainer.zero import checkpoint
from trainer.zero.engine import ZeroEngine
from trainer.zero.group import Group
from trainer.zero.partition import Segment
from trainer.zero.rankfile import Ranges, copy_ranges, hash_file, put_hashed

log = get_logger("export")
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # safetensors' own names


def open_weights(uri: str, shapes: Mapping[str, tuple[int, ...]]) -> Callable[[str], Tensor]:
    """Tensors of a weights file by name. QK-norms that it lacks are ones. A branch of the second time that it lacks
    reads time as the first one does, and ends in zeros: the network computes what it did, to the bit."""
    from safetensors import safe_open

    file: Any = safe_open(str(find_weights(uri)), framework="pt")
    names = set(file.keys())

    def read(name: str) -> Tensor:
        if name not in names and name.rsplit(".", 2)[-2] in ("norm_q", "norm_k"):
            return torch.ones(shapes[name])
        if name not in names and name.startswith("condition.interval."):
            return torch.zeros(shapes[name]) if ".outer." in name else file.get_tensor(name.replace("interval", "time"))
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
    ordered = iter(engine.trained)  # in the order in which `write` asks: that of the network's layers
    if group.rank == 0:
        recipe = engine.recipe
        known = engine.shapes | engine.trained
        buffers = {n: b.cpu() for n, b in engine.model.state_dict().items() if n not in known}
        shapes = engine.shapes | {n: tuple(b.shape) for n, b in buffers.items()}

        def trained(name: str) -> Tensor:
            return engine.gather_whole(next(ordered), tensors)

        read_merged: Callable[[str], Tensor] = trained

        def read(name: str) -> Tensor:
            return buffers[name] if name in buffers else read_merged(name)

        try:
            if recipe.lora.rank is not None:
                assert base is not None, "a run with adapters keeps the file of its frozen weights"
                scale = recipe.lora_alpha / recipe.lora.rank
                read_merged = merge_when_read(open_weights(base, engine.shapes), trained, engine.trained, scale=scale)
            write(uris, Weights(shapes, read, meta))
        except (UserError, OSError) as error:
            problem = str(error)
            log.warning("weights not exported: %s", problem)
    for name in ordered:  # the other ranks, and rank 0 after a failure: whatever happens, all take part in each gather
        engine.gather_whole(name, tensors)
    return not group.any(bool(problem))


class Weights(Mapping[str, Tensor]):
    """Named tensors, each read when it is asked for; refuses those that are empty, misshapen or not finite."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], meta: Meta) -> None:
        self.shapes, self.meta, self._read = dict(shapes), meta, read

    def __getitem__(self, name: str) -> Tensor:
        tensor, shape = self._read(name).detach().to("cpu", torch.float32), self.shapes[name]
        if tuple(tensor.shape) != shape or not torch.isfinite(tensor).all():
            found = f"{name} is {tuple(tensor.shape)} or not finite"
            raise UserError(f"{self.meta['kind']} weights: {found}, expected finite {shape}")
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def check_names(self) -> dict[str, Tensor]:
        """What the model that `meta` describes has, on the meta device; UserError when these weights are others."""
        expected = list_expected_tensors(self.meta)
        shapes = {name: tuple(x.shape) for name, x in expected.items()}
        if shapes != self.shapes:
            wrong = sorted({n for n in shapes.keys() | self.shapes.keys() if shapes.get(n) != self.shapes.get(n)})
            raise UserError(f"{len(wrong)} tensors do not fit the model ({', '.join(wrong[:4])} ...)")
        return expected


def write(uris: list[str], weights: Weights, *, dtype: torch.dtype = torch.float32) -> None:
    """One safetensors file at every URI, the tensors asked for in their order."""
    weights.check_names()
    put_hashed(uris[0], stream_file(weights.shapes, weights.items(), weights.meta, dtype=dtype))
    for uri in uris[1:]:
        _copy(uris[0], uri)


def stream_file(
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Tensor]],
    meta: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, each tensor rounded to `dtype` and taken when the one before it is written."""
    header: dict[str, Any] = {"__metadata__": {META_KEY: json.dumps(meta), "format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for (name, shape), (found, tensor) in zip(shapes.items(), tensors, strict=True):
        assert (found, tuple(tensor.shape), tensor.dtype) == (name, shape, torch.float32), name
        yield tensor.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data


def _copy(source: str, target: str) -> None:
    """A second name for the same content: a hard link where the file system has them."""
    if storage.is_remote(target):
        with storage.open_read(source) as file:
            put_hashed(target, iter(lambda: file.read(storage.READ_AHEAD), b""))
        return
    source_path, target_path = storage.local_path(source), storage.local_path(target)
    with storage.reserve_temp_path(target_path) as temp:
        try:
            os.link(source_path, temp)
        except OSError:
            shutil.copyfile(source_path, temp)
        temp.replace(target_path)


class StoredWeights:
    """What a checkpoint on disk or S3 holds, tensor by tensor, without DeepSpeed and on one process."""

    def __init__(self, folder: str, *, kind: str, profile: str | None) -> None:
        found, reason = checkpoint.inspect(folder, Group(0, 1, torch.device("cpu")))
        if found is None:
            raise UserError(f"{folder}: not a whole checkpoint ({reason})")
        self.recipe = Recipe.from_json(found.state["recipe"])
        self.images_seen = int(found.state["images_seen"])
        self._name = "master" if kind == "raw" else f"ema/{profile or self.recipe.ema.profiles[0]}"
        self._ranges = Ranges(found.uri, found.indexes)
        self.shapes = self._ranges.shapes

    def __call__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise UserError(f"{self._ranges.folder}: holds no {name!r}; it is a checkpoint of another architecture")
        shape = self.shapes[name]
        flat = torch.empty(torch.Size(shape).numel())
        copy_ranges(self._ranges, [(Segment(name, shape, 0, flat.numel(), 0),)], {self._name: [flat]})
        return flat.view(shape)


def read_stored_weights(
    folder: str, *, kind: str, profile: str | None, info: DatasetInfo, run: str, base: str | None = None
) -> Weights:
    """The whole weights of a checkpoint, adapters merged into `base`."""
    stored = StoredWeights(folder, kind=kind, profile=profile)
    recipe = stored.recipe
    with torch.device("meta"):
        shapes = {name: tuple(param.shape) for name, param in recipe.model.build().named_parameters()}
    read_merged: Callable[[str], Tensor] = stored
    if recipe.lora.rank is not None:
        scale = recipe.lora_alpha / recipe.lora.rank
        frozen = open_weights(check_base(recipe, base), shapes)
        read_merged = merge_when_read(frozen, stored, stored.shapes, scale=scale)
    elif base is not None:
        raise UserError(f"{folder}: this run trained all of its weights, there is nothing to merge: omit --base")
    buffers = {POSITIONS: make_position_table(recipe.model).axes_2PD} if recipe.model.pos_stored else {}
    meta = describe_weights(recipe, info, kind=kind, images_seen=stored.images_seen, run=run)
    if kind == "ema" and profile:
        meta["ema_profile"] = profile
    return Weights(
        shapes | {n: tuple(b.shape) for n, b in buffers.items()},
        lambda name: buffers[name] if name in buffers else read_merged(name),
        meta,
    )


def check_base(recipe: Recipe, base: str | None) -> str:
    """The file of the frozen weights; UserError when it is not the one that the run started from."""
    if base is None:
        raise UserError("this run trained adapters: give --base, the weights it started from, or --lora adapter")
    if hash_file(str(find_weights(base))) != recipe.init_weights:
        raise UserError(f"{base} is not the file that the run started from (sha256 {recipe.init_weights})")
    return base


def export_as(
    to: str, folder: str, *, kind: str, profile: str | None, info: DatasetInfo, run: str, out: str,
    base: str | None = None, dtype: torch.dtype = torch.float32,
) -> int:  # fmt: skip
    """A checkpoint in one of the formats; the number of parameters."""
    weights = read_stored_weights(folder, kind=kind, profile=profile, info=info, run=name_run(run), base=base)
    return write_as(to, out, weights, info=info, run=run, dtype=dtype)


def write_as(
    to: str, out: str, weights: Weights, *, info: DatasetInfo, run: str, dtype: torch.dtype = torch.float32
) -> int:
    """Our file, one file with SD3's names, or a diffusers folder, each with a model card; the number of parameters."""
    model = read_config(weights.meta["backbone"], weights.meta["config"])
    if to == "beeline":
        write([out], weights, dtype=dtype)
    else:
        check_target(Path(out), to)
        if not isinstance(model, MMDiTConfig):
            raise UserError(f"{run}: trained a {model.name}; only mmdit has other formats: omit --format")
        if to == "sd3":
            _write_sd3(out, model, weights, dtype)
        else:
            _write_diffusers(out, model, weights, info, run, dtype)
    if to != "diffusers":
        storage.write_bytes(f"{out}.md", format_model_card(run, weights.meta, file=out.rsplit("/", 1)[-1]).encode())
    return model.count_parameters()


def _write_sd3(out: str, model: MMDiTConfig, weights: Weights, dtype: torch.dtype) -> None:
    shapes = {name: tuple(like.shape) for name, like in to_sd3(model, weights.check_names())}
    put_hashed(out, stream_file(shapes, to_sd3(model, weights), weights.meta, dtype=dtype))


def _write_diffusers(
    out: str, model: MMDiTConfig, weights: Weights, info: DatasetInfo, run: str, dtype: torch.dtype
) -> None:
    """The library writes the small parts into a folder here; the weights go straight to where they belong."""
    weights.check_names()
    written = []
    with tempfile.TemporaryDirectory() as temp:

        def save(path: Path, layout: Mapping[str, Tensor], tensors: Iterator[tuple[str, Tensor]], meta: Any) -> None:
            written.append(storage.join(out, *path.relative_to(temp).parts))
            shapes = {name: tuple(like.shape) for name, like in layout.items()}
            put_hashed(written[-1], stream_file(shapes, tensors, meta, dtype=dtype))

        vae = resolve(info.vae.checkpoint)
        write_pipeline(Path(temp), model, weights, weights.meta, vae=vae, encoders={}, save=save)
        with (Path(temp) / "README.md").open("a") as card:
            card.write("\n" + format_figures(run))
        for path in sorted(file for file in Path(temp).rglob("*") if file.is_file()):
            written.append(storage.join(out, *path.relative_to(temp).parts))
            storage.upload(path, written[-1])
    for old in storage.list_files(storage.join(out, "transformer")):
        if old not in written and old.rsplit("/", 1)[-1].startswith(TRANSFORMER):
            storage.delete(old)  # diffusers would read an index left there
