"""Writes a folder for diffusers' StableDiffusion3Pipeline: our weights; encoders and autoencoder where given.

All parts are checked before anything is written. The trap: diffusers and transformers give random weights to every
tensor that a file lacks or has in another shape.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.codec import from_json
from infra.errors import UserError, list_some
from model.backbones.mmdit import MMDiTConfig
from model.diffusion.few_step import FewStep
from model.encoders.vae import load_vae
from model.files.names import make_diffusers_config, to_diffusers
from model.files.weights import add_config, apply_umask, list_expected_tensors, write_safetensors

# The encoder's seat -> folders of model and tokenizer.
_ENCODER_PARTS = {
    "clip_l": ("text_encoder", "tokenizer"),
    "clip_g": ("text_encoder_2", "tokenizer_2"),
    "t5": ("text_encoder_3", "tokenizer_3"),
}
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
MAX_FILE = 10_000_000_000  # bytes of weights in one file; more are split as diffusers' own save_pretrained does
TRANSFORMER = "diffusion_pytorch_model"  # how the names of its weights begin

# Writes a safetensors file: its path, what it will hold (on the meta device), the tensors in that order, metadata.
Save = Callable[[Path, Mapping[str, Tensor], Iterator[tuple[str, Tensor]], Mapping[str, Any]], object]


def save_at_once(
    path: Path, layout: Mapping[str, Tensor], tensors: Iterator[tuple[str, Tensor]], meta: Mapping[str, Any]
) -> None:
    """A `Save` for tensors that are in memory anyway: all tensors of a file are collected, then written."""
    write_safetensors(path, dict(tensors), meta)


@dataclass(frozen=True)
class _Encoder:
    """A text encoder's transformers folder that was checked. `width`: features of a token's hidden state. `pooled`:
    features of the pooled vector; 0 for T5, which has none."""

    files: tuple[Path, ...]
    architecture: str
    tokenizer: Any
    width: int
    pooled: int


def write_pipeline(
    target: Path,
    config: MMDiTConfig,
    state: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    vae: Path | None = None,
    encoders: Mapping[str, Path],
    save: Save = save_at_once,
) -> None:
    """Write a folder for StableDiffusion3Pipeline.from_pretrained. model_index.json names parts that are not given as
    absent.

    `state`: our tensors by our names. They are read one by one, while `save` writes the file that they belong to.
    `vae`: an autoencoder's folder. `encoders`: seat -> a transformers folder. UserError where a part is damaged or does
    not fit `config`.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, __version__

    unknown = set(encoders) - set(_ENCODER_PARTS)
    if unknown:
        raise UserError(f"encoders for unknown seats {sorted(unknown)}; known: {', '.join(_ENCODER_PARTS)}")
    autoencoder = None if vae is None else _load_autoencoder(vae, config)
    read = {seat: _read_encoder(seat, Path(path)) for seat, path in encoders.items()}
    _check_widths(read, config)
    with torch.device("meta"):
        transformer: Any = SD3Transformer2DModel(**make_diffusers_config(config))
    transformer.save_config(target / "transformer")
    _write_transformer(target / "transformer", config, state, add_config(config, meta), save)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**make_scheduler_config(meta))
    scheduler.save_pretrained(target / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": __version__,
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "vae": ["diffusers", "AutoencoderKL"] if autoencoder else [None, None],
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
    }
    if autoencoder:
        autoencoder.save_pretrained(target / "vae")
        apply_umask(*(target / "vae").glob("*.safetensors"))
    for seat, (model_folder, tokenizer_folder) in _ENCODER_PARTS.items():
        index |= {model_folder: [None, None], tokenizer_folder: [None, None]}
        if seat in read:
            (target / model_folder).mkdir(parents=True, exist_ok=True)
            for file in read[seat].files:
                shutil.copy2(file, target / model_folder)
            read[seat].tokenizer.save_pretrained(target / tokenizer_folder)
            index[model_folder] = ["transformers", read[seat].architecture]
            index[tokenizer_folder] = ["transformers", type(read[seat].tokenizer).__name__]
    (target / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (target / "README.md").write_text(
        _write_card(config, meta, [name for name, entry in index.items() if entry == [None, None]])
    )


def make_scheduler_config(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of diffusers' FlowMatchEulerDiscreteScheduler, for times that our weights were trained at.

    Before the shift, the scheduler's n times go evenly from 1 to nearly 0. A student on a grid of n steps knows the
    times 1, (n-1)/n ... 1/n. `shift_terminal` stretches the scheduler's times linearly until the last one is the
    student's. Without a shift all n times are then the student's; with a shift they are for n = 2 alone. So a student
    of 3 or more steps with a shift needs `sigmas` in the call, as the model card says. One step needs neither: its time
    is 1 in both.
    """
    shift = float(meta.get("shift", 1.0))
    steps = _count_steps(meta)
    if steps is None or steps == 1 or (shift != 1.0 and steps > 2):
        return {"shift": shift}
    last = 1.0 / steps
    # The resolution shift of the last time (SD3, eq. 23).
    return {"shift": shift, "shift_terminal": shift * last / (1 + (shift - 1) * last)}


def _count_steps(meta: Mapping[str, Any]) -> int | None:
    """The steps of a student's grid; None where any number will do."""
    student = FewStep.of(meta)
    return student.steps if student else None


def _describe_sampling(meta: Mapping[str, Any]) -> list[str]:
    """Lines of the card: what makes the pipeline give the pictures of `python -m eval sample`."""
    student = dict(meta.get("few_step") or {})
    baked = student.get("guidance_kind") == "baked"
    steps = _count_steps(meta)
    guidance = "1.0" if student else "4.0"
    lines = [
        "The pictures of `python -m eval sample` (Euler) need its times. The scheduler shifts them by itself:",
        "",
        "```python",
        f"steps = {steps or (4 if student else 25)}",
        "sigmas = [1 - i / steps for i in range(steps)]",
        f"pipeline(PROMPT, num_inference_steps=steps, sigmas=sigmas, guidance_scale={guidance})",
        "```",
        "",
    ]
    if steps is not None:
        suffices = _scheduler_suffices(meta, steps)
        needed = "`num_inference_steps` alone gives the same" if suffices else "`sigmas` are needed"
        lines += [f"This student knows the grid of {steps} steps alone; {needed}.", ""]
    if baked:
        learnt = float(student.get("guidance", 1.0))
        why = (
            f"Guidance {learnt:g} is baked in. So `guidance_scale` must be 1, as another one multiplies with it."
            if learnt != 1.0 else
            "Captions were never dropped in training, so guidance leads away from nothing: `guidance_scale` must be 1."
        )  # fmt: skip
        lines += [
            f"{why} The pipeline's own default is 7.",
            "",
        ]
    return lines


def _scheduler_suffices(meta: Mapping[str, Any], steps: int) -> bool:
    """Does the scheduler take a student's own times without `sigmas`?"""
    return steps == 1 or "shift_terminal" in make_scheduler_config(meta)


def _write_transformer(
    folder: Path, config: MMDiTConfig, state: Mapping[str, Tensor], meta: Mapping[str, Any], save: Save
) -> None:
    """Write the transformer's weights, in several files with an index where one would exceed MAX_FILE.

    The layout on the meta device comes first: the files are planned before a tensor is read.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    dtype = state["context_embed.weight"].dtype
    expected = {name: tensor.to(dtype) for name, tensor in list_expected_tensors(meta).items()}
    layout = {name: torch.empty_like(tensor, device="meta") for name, tensor in to_diffusers(config, expected)}
    pattern = TRANSFORMER + "{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(layout, filename_pattern=pattern, max_shard_size=MAX_FILE)
    for old in folder.glob(f"{TRANSFORMER}*"):
        if old.name not in split.filename_to_tensors:
            old.unlink()  # diffusers would read an index left there
    tensors = to_diffusers(config, state)
    for name, names in split.filename_to_tensors.items():
        save(folder / name, {n: layout[n] for n in names}, islice(tensors, len(names)), meta)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{TRANSFORMER}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _load_autoencoder(path: Path, config: MMDiTConfig) -> Any:
    vae = load_vae(path)
    channels = vae.config.latent_channels
    if channels != config.in_channels:
        raise UserError(f"{path}: an autoencoder of {channels} channels beside a model of {config.in_channels}")
    return vae


def _read_encoder(seat: str, source: Path) -> _Encoder:
    """Check a text encoder's folder and load its tokenizer.

    UserError for a model type that is not the seat's, for weights under names that transformers does not read, and for
    tensors that are absent or of another shape.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    from model.encoders.networks import load_tokenizer

    if not (source / "config.json").is_file():
        raise UserError(f"no config.json in {source}; the {seat} encoder must be a transformers folder")
    config = from_json(dict[str, Any], (source / "config.json").read_bytes(), where=f"{source}/config.json")
    wanted = "clip_text_model"
    architecture, kind = CLIPTextModelWithProjection, CLIPTextConfig
    if seat == "t5":
        wanted, architecture, kind = "t5", T5EncoderModel, T5Config
    if config.get("model_type") != wanted:
        raise UserError(f"{source}: model_type {config.get('model_type')!r}, the {seat} encoder must be {wanted!r}")
    weights = [file for file in sorted(source.iterdir()) if _WEIGHTS.fullmatch(file.name)]
    if not weights:
        raise UserError(f"no model.safetensors in {source}; save_pretrained of {architecture.__name__} writes it")
    settings = kind.from_pretrained(str(source), local_files_only=True)
    missing = _list_missing(architecture, settings, weights)
    if missing:
        raise UserError(f"{source}: tensors {list_some(missing)} are not there as {architecture.__name__} needs them")
    index = source / "model.safetensors.index.json"
    files = (source / "config.json", *weights, *([index] if index.is_file() else []))
    pooled = 0 if seat == "t5" else settings.projection_dim
    return _Encoder(files, architecture.__name__, load_tokenizer(source), settings.hidden_size, pooled)


def _list_missing(architecture: Any, settings: Any, files: list[Path]) -> list[str]:
    """Parameters that the files lack or have in another shape; only headers are read."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(str(path), framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file ({error})") from None
    with torch.device("meta"):
        model = architecture(settings)
    # Tied parameters are one tensor under two names, target -> source; a file may hold it under either name.
    tied = model.all_tied_weights_keys

    def tensor_fits(name: str, shape: tuple[int, ...]) -> bool:
        names = [name, tied.get(name), *(target for target, source in tied.items() if source == name)]
        return any(shapes.get(known) == shape for known in names if known)

    return [name for name, parameter in model.named_parameters() if not tensor_fits(name, tuple(parameter.shape))]


def _check_widths(read: Mapping[str, _Encoder], config: MMDiTConfig) -> None:
    """UserError where the encoders' features do not fit the model.

    SD3 joins the hidden states of both CLIPs along the features and pads them with zeros to T5's width, which is
    `context_width`. It joins the CLIPs' pooled vectors to one of `pooled_width`.
    """
    clips = [encoder for seat, encoder in read.items() if seat != "t5"]
    states, pooled = sum(e.width for e in clips), sum(e.pooled for e in clips)
    if states > config.context_width or ("t5" in read and read["t5"].width != config.context_width):
        t5 = f", t5 of {read['t5'].width}" if "t5" in read else ""
        raise UserError(
            f"CLIP states of width {states}{t5} do not fit the model's context_width {config.context_width}"
        )
    if pooled > config.pooled_width or (len(clips) == 2 and pooled != config.pooled_width):
        raise UserError(f"pooled vectors of width {pooled} do not fit the model's pooled_width {config.pooled_width}")


def _write_card(config: MMDiTConfig, meta: Mapping[str, Any], absent: list[str]) -> str:
    """The model card: what this is, where it comes from, how to load it."""
    optional = ("image_encoder", "feature_extractor")
    needed = [name for name in absent if name not in optional]
    arguments = ", ".join(["FOLDER", *(f"{name}=None" for name in needed)])
    facts = {k: v for k, v in meta.items() if k not in ("config", "text_spec", "vae")}
    lines = [
        "---",
        "library_name: diffusers",
        "tags: [text-to-image, rectified-flow]",
        "---",
        f"# MM-DiT of depth {config.depth}, {config.count_parameters():,} parameters",
        "",
        "Load with:",
        "",
        "```python",
        "from diffusers import StableDiffusion3Pipeline",
        f"pipeline = StableDiffusion3Pipeline.from_pretrained({arguments})",
        "```",
        "",
    ]
    if needed:
        lines += [
            f"Not included, hence passed as None: {', '.join(needed)}. Pass prompt embeddings or latents instead.",
            "",
        ]
    lines += _describe_sampling(meta)
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    return "\n".join(lines) + "\n"
