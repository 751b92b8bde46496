"""Low-rank adapters on every Linear of a network: W x + (alpha/r) B A x, with B zero at the start (arXiv 2106.09685).

The network's own parameters are frozen and keep their names. With the adapters switched off it computes the same bits
as without them. So one set of weights is both policy and reference in DPO. Files have peft's layout, with our names of
modules.
"""
# Shapes: I inputs, O outputs of a linear layer, R rank.

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from infra.codec import from_json
from infra.errors import UserError
from model.backbones.mmdit import MMDiTConfig
from model.files.adapters import CONFIG_FILE, read_foreign_adapter
from model.files.weights import META_KEY, load_weights, save_weights
from model.seeding import draw_, seeded

if TYPE_CHECKING:
    from model.backbones.trunk import TokenConfig

PART = ".lora."
WEIGHTS_FILE = "adapter_model.safetensors"
_PEFT = {"a": "lora_A.weight", "b": "lora_B.weight"}
_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """adapter_config.json: the fields that peft asks for. Literals are the only values that we merge."""

    peft_type: Literal["LORA"] = "LORA"
    r: int
    lora_alpha: float
    target_modules: tuple[str, ...] | str | None = None
    lora_dropout: float = 0.0
    bias: Literal["none"] = "none"
    fan_in_fan_out: Literal[False] = False
    use_rslora: Literal[False] = False
    use_dora: Literal[False] = False
    inference_mode: bool = True
    base_model_name_or_path: str | None = None
    task_type: str | None = None

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"r is {self.r}, expected 1 or more")


class Adapter(nn.Module):
    """The low-rank part of one linear layer; A starts as peft's does (Kaiming uniform, a = sqrt 5), B as zeros."""

    def __init__(self, inputs: int, outputs: int, *, rank: int, scale: float):
        super().__init__()
        self.scale, self.on = scale, True
        self.a = nn.Parameter(torch.empty(rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank))
        draw_(self.a, lambda a: nn.init.kaiming_uniform_(a, a=math.sqrt(5)))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.a), self.b) * self.scale


def add_adapters(model: nn.Module, *, rank: int, alpha: float, seed: int = 0) -> None:
    """Freeze the model and give each nn.Linear (the patch convolution is none) an adapter that trains."""
    model.requires_grad_(False)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    with seeded(seed):
        for linear in linears:
            linear.lora = Adapter(linear.in_features, linear.out_features, rank=rank, scale=alpha / rank)
            linear.register_forward_hook(_add)


def _add(linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    adapter: Any = linear.lora
    return output + adapter(inputs[0]) if adapter.on else output


@contextlib.contextmanager
def switch_off_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the block the network computes without its adapters: the reference of DPO."""
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    for adapter in adapters:
        adapter.on = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.on = True


def is_adapter(name: str) -> bool:
    """Is this parameter part of an adapter?"""
    return PART in name


def name_adapter(name: str) -> tuple[str, str]:
    """Names of A and B for the name of a linear layer's weight."""
    module = name.removesuffix(".weight")
    return f"{module}{PART}a", f"{module}{PART}b"


def merge_adapter(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, *, scale: float) -> Tensor:
    """W + scale * B A, computed and returned in fp32."""
    return weight_OI.float() + scale * (b_OR.float() @ a_RI.float())


@functools.lru_cache
def count_adapter_parameters(config: TokenConfig, rank: int) -> int:
    """Parameters of the adapters that `add_adapters` gives a network."""
    with torch.device("meta"):
        model = config.build()
        add_adapters(model, rank=rank, alpha=rank)
    return sum(p.numel() for name, p in model.named_parameters() if is_adapter(name))


def to_peft_name(name: str) -> str:
    """`blocks.0.mlp.lora.a` as peft calls it: `base_model.model.blocks.0.mlp.lora_A.weight`."""
    module, part = name.rsplit(PART, 1)
    return f"{_PREFIX}{module}.{_PEFT[part]}"


def make_peft_config(names: Iterable[str], *, rank: int, alpha: float) -> PeftConfig:
    """For adapters with these parameter names."""
    modules = sorted({name.rsplit(PART, 1)[0] for name in names})
    return PeftConfig(r=rank, lora_alpha=alpha, target_modules=tuple(modules))


def merge_files(base: str | Path, adapter: str | Path, out: str | Path) -> Path:
    """Weights with an adapter merged in: an ordinary weights file. The adapter is a folder that the trainer exported
    (peft's layout), or a file or folder with diffusers' or kohya's names."""
    state_dict, meta = load_weights(base)
    path = Path(adapter)
    path = path / WEIGHTS_FILE if _has_diffusers_names(path) else path
    if path.is_dir() and (path / CONFIG_FILE).is_file():
        changes, trained = _read_changes(path, state_dict)
    else:
        if meta["backbone"] != "mmdit":
            raise UserError(f"{base} holds a {meta['backbone']}; adapters of diffusers and kohya are for mmdit alone")
        changes, trained = read_foreign_adapter(_find_file(path), MMDiTConfig.from_json(meta["config"])), {}
    for name, change_OI in changes.items():
        given, fits = tuple(change_OI.shape), tuple(state_dict[name].shape)
        if given != fits:
            raise UserError(f"{adapter}: the adapter of {name} is for {given}, the weights of {base} are {fits}")
        state_dict[name] = state_dict[name].float() + change_OI
    kept = {key: trained[key] for key in trained if key not in ("backbone", "config")}
    return save_weights(out, state_dict, {**meta, **kept})


def _has_diffusers_names(folder: Path) -> bool:
    """Did peft write an adapter of diffusers' transformer, rather than of our network?"""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(folder / WEIGHTS_FILE), framework="pt") as file:
            return any(name.startswith(f"{_PREFIX}transformer_blocks.") for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return False  # which reading it says


def _find_file(path: Path) -> Path:
    """The safetensors file of an adapter, or the single one of its folder."""
    if not path.exists():
        raise UserError(f"{path}: no adapter there, expected a folder with {CONFIG_FILE} or a .safetensors file")
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise UserError(f"{path}: {len(found)} safetensors files there; name the adapter's file")
    return found[0]


def _read_changes(folder: Path, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """(the change of each weight by our own adapter, the metadata of its training)."""
    adapters, scale, trained = _read_adapter(folder)
    named = {name: name_adapter(name) for name in weights if name_adapter(name)[0] in adapters}
    strange = sorted(set(adapters) - {part for parts in named.values() for part in parts})
    if strange:
        raise UserError(f"{folder}: {len(strange)} tensors belong to no layer of the weights ({strange[0]} ...)")
    return {name: scale * (adapters[b].float() @ adapters[a].float()) for name, (a, b) in named.items()}, trained


def _read_adapter(folder: Path) -> tuple[dict[str, Tensor], float, Mapping[str, Any]]:
    """(tensors under our names, alpha/r, the metadata of its training)."""
    from safetensors import SafetensorError, safe_open

    try:
        config = from_json(PeftConfig, (folder / CONFIG_FILE).read_bytes(), where=CONFIG_FILE, extra="ignore")
        with safe_open(str(folder / WEIGHTS_FILE), framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            meta = from_json(dict[str, Any], (file.metadata() or {}).get(META_KEY, "{}"), where=f"{META_KEY} metadata")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder}: no adapter there, expected {CONFIG_FILE} and {WEIGHTS_FILE} ({' '.join(str(error).split())})"
        ) from None
    ours: dict[str, Tensor] = {}
    for name, tensor in found.items():
        for part, suffix in _PEFT.items():
            if name.startswith(_PREFIX) and name.endswith(f".{suffix}"):
                ours[name.removeprefix(_PREFIX).removesuffix(f".{suffix}") + PART + part] = tensor
    if len(ours) < len(found):
        raise UserError(f"{folder}: {len(found) - len(ours)} tensors are no LoRA of a linear layer")
    return ours, config.lora_alpha / config.r, meta


def merge_when_read(
    read: Callable[[str], Tensor], adapter: Callable[[str], Tensor], names: Iterable[str], *, scale: float
) -> Callable[[str], Tensor]:
    """A function that gives merged weights, one tensor at a time. `read` gives a tensor of the base weights, `adapter`
    a tensor of the adapter, which has those named in `names`."""
    known = set(names)

    def read_merged(name: str) -> Tensor:
        a, b = name_adapter(name)
        return merge_adapter(read(name), adapter(a), adapter(b), scale=scale) if a in known else read(name)

    return read_merged
