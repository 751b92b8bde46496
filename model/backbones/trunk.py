"""What all backbones share: the config's fields and counts, and the embedding of latents, time and text into tokens."""
# Shapes: B batch, N image tokens, L text tokens, D width, C channels of the latents. Symbols in counts: h width.

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infra.codec import from_json, to_json
from infra.errors import UserError
from model.backbones.attention import HEAD_WIDTH, make_key_bias
from model.backbones.layers import (
    TIME_CHANNELS,
    Condition,
    FinalLayer,
    PatchEmbed,
    XavierLinear,
    split_condition,
    unpatchify,
)
from model.backbones.norms import NormBackend
from model.backbones.position import PositionTable
from model.encoders.text import TextCond
from model.seeding import seeded


class MultiplyAdds(NamedTuple):
    """Multiply-adds of one forward pass for one image. `stem`: the layers that read data, whose inputs need no
    gradient; `inner`: all others."""

    stem: int
    inner: int


@dataclass(frozen=True)
class TokenConfig(ABC):
    """Everything that decides the weights' shapes; JSON-able. Width is 64*depth; pos_*: see position.py.

    `second_time`: the network takes r beside t and predicts average velocities (MeanFlow).
    """

    depth: int
    patch: int = 2
    in_channels: int = 16
    context_width: int = 4096
    pooled_width: int = 2048
    qk_norm: bool = True
    pos_max: int = 192
    pos_tokens: int = 16
    pos_base: int = 16
    pos_stored: bool = False
    norm_backend: NormBackend = "torch"
    second_time: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", int) and (type(value) is not int or value < 1):
                raise UserError(f"{type(self).__name__}.{field.name} is {value!r}, expected an integer of at least 1")
            if field.type in ("bool", bool) and type(value) is not bool:
                raise UserError(f"{type(self).__name__}.{field.name} is {value!r}, expected true or false")

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def make_module(self) -> nn.Module:
        """The network with fresh weights from torch's current random state."""

    @abstractmethod
    def count_block_parameters(self) -> int:
        """Parameters of all blocks."""

    @abstractmethod
    def count_block_multiply_adds(self, tokens: int, text_tokens: int) -> int:
        """Multiply-adds of all blocks."""

    @property
    def width(self) -> int:
        return HEAD_WIDTH * self.depth

    @property
    def heads(self) -> int:
        return self.depth

    @property
    def pixels(self) -> int:
        """Numbers in one patch."""
        return self.patch**2 * self.in_channels

    @property
    def qk_parameters(self) -> int:
        """Parameters of one pair of query and key norms; 0 without QK-norm."""
        return 2 * HEAD_WIDTH if self.qk_norm else 0

    def build(self, *, seed: int = 0) -> nn.Module:
        """The module with initial weights drawn from `seed`; under `torch.device("meta")` it costs no memory."""
        with seeded(seed):
            return self.make_module()

    @classmethod
    def for_text(cls, text_tokens: int, **fields: Any) -> Self:
        """A config for contexts of so many tokens; a backbone whose fields depend on that number sets them here."""
        return cls(**fields)

    @property
    def interval_parameters(self) -> int:
        """Parameters of the branch of the second time; 0 without it."""
        h = self.width
        return (TIME_CHANNELS + 1) * h + h * h + h if self.second_time else 0

    def to_json(self) -> dict[str, Any]:
        fields = to_json(self)
        if not self.second_time:  # this field is younger than the first hashes and weights files, which stay
            del fields["second_time"]
        return fields

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return from_json(cls, data, where=cls.__name__)

    def count_parameters(self) -> int:
        """Number of parameters by a formula; test_model_flops.py compares it with the module's own parameters."""
        h = self.width
        # Patches, time features and pooled text (each Linear, SiLU, Linear: hence 2 (h*h + h)), then the context.
        embed = (self.pixels + 1) * h + (TIME_CHANNELS + 1 + self.pooled_width + 1) * h + 2 * (h * h + h)
        embed += (self.context_width + 1) * h + self.interval_parameters
        # Shift and scale from c (2 h vectors), then the projection to pixels.
        final = 2 * h * h + 2 * h + self.pixels * h + self.pixels
        return embed + self.count_block_parameters() + final

    def count_multiply_adds(self, height: int, width: int, text_tokens: int) -> MultiplyAdds:
        """Height and width are of the latents."""
        h, tokens = self.width, (height // self.patch) * (width // self.patch)
        stem = self.pixels * h * tokens + (TIME_CHANNELS + self.pooled_width) * h + self.context_width * h * text_tokens
        interval = h if self.second_time else 0
        stem += TIME_CHANNELS * interval
        ends = 2 * h * h + interval * h + 2 * h * h + self.pixels * h * tokens
        return MultiplyAdds(stem, ends + self.count_block_multiply_adds(tokens, text_tokens))

    def count_forward_flops(self, height: int, width: int, text_tokens: int) -> int:
        """FLOPs of one image's forward pass, two per multiply-add, as torch.utils.flop_counter counts them. `height`
        and `width` are those of the latent."""
        counts = self.count_multiply_adds(height, width, text_tokens)
        return 2 * (counts.stem + counts.inner)

    def count_backward_flops(self, height: int, width: int, text_tokens: int) -> int:
        """FLOPs of one image's backward pass: twice those of the inner layers, once those of the layers that read
        data."""
        counts = self.count_multiply_adds(height, width, text_tokens)
        return 2 * (counts.stem + 2 * counts.inner)


class Embedded(NamedTuple):
    """Tokens of both modalities, the conditioning, the additive bias of masked text keys, the image grid.

    The conditioning is one vector for each sample. Where tokens have times of their own it has one for each token,
    (B, N + L, D).
    """

    x_BND: Tensor
    y_BLD: Tensor
    c_BD: Tensor
    bias: Tensor | None
    rows: int
    columns: int


class TokenBackbone(nn.Module):
    """Embedding and output; a child adds `blocks` and its forward. `checkpoint_blocks` recomputes them in backward.

    `blocks` is a ModuleList of modules of a class of their own: ZeRO-3 gathers the parameters of all modules of that
    class at once, so a bare nn.Linear there would drag every other linear layer along, and its backward pass fails.
    """

    def __init__(self, config: TokenConfig, *, patch_channels: int | None = None):
        super().__init__()
        self.config: Any = config
        self.checkpoint_blocks = False
        width = config.width
        self.patch_embed = PatchEmbed(patch_channels or config.in_channels, width, config.patch)
        self.positions = PositionTable(
            width, config.pos_max, target=config.pos_tokens, base=config.pos_base, stored=config.pos_stored
        )
        self.condition = Condition(config.pooled_width, width, second_time=config.second_time)
        self.context_embed = XavierLinear(config.context_width, width)

    def make_final(self) -> FinalLayer:
        return FinalLayer(self.config.width, self.config.pixels, self.config.norm_backend)

    def check_inputs(self, x_BCHW: Tensor, t: Tensor, text: TextCond, r: Tensor | None = None) -> None:
        """Refuse text of other widths than the model was built for, and parts of different batches."""
        config, batch, mask = self.config, x_BCHW.shape[0], text.mask_BL
        if x_BCHW.ndim != 4 or 0 in x_BCHW.shape:
            raise UserError(f"latents of shape {tuple(x_BCHW.shape)}, expected (batch, channels, height, width)")
        tokens = x_BCHW.shape[-2] * x_BCHW.shape[-1] // config.patch**2
        if tuple(t.shape) not in ((batch,), (batch, tokens)) or len(text) != batch or len(text.pooled_BP) != batch:
            raise UserError(
                f"{batch} latents with times of shape {tuple(t.shape)} and text for {len(text)} (context), "
                f"{len(text.pooled_BP)} (pooled); expected {batch} of each"
            )
        if r is not None and not config.second_time:
            raise UserError("a second time was given to a network that has none: its config lacks second_time")
        if r is not None and r.shape != t.shape:
            raise UserError(f"second times of shape {tuple(r.shape)} beside times of shape {tuple(t.shape)}")
        if mask is not None and (mask.shape != text.context_BLD.shape[:2] or mask.dtype != torch.bool):
            raise UserError(
                f"text mask of shape {tuple(mask.shape)} and type {mask.dtype}, expected "
                f"{tuple(text.context_BLD.shape[:2])} and torch.bool"
            )
        if text.context_BLD.shape[-1] != config.context_width or text.pooled_BP.shape[-1] != config.pooled_width:
            raise UserError(
                f"text of widths {text.context_BLD.shape[-1]} (context), {text.pooled_BP.shape[-1]} (pooled) does not "
                f"fit the model's {config.context_width}, {config.pooled_width}"
            )

    def embed_times(self, t: Tensor, text: TextCond, r: Tensor | None = None) -> Tensor:
        """c_BD from times t_B; c_BSD, image before text, from times of image tokens t_BN. Text tokens have no noise of
        their own and take the mean of the image's times."""
        if t.ndim == 2:
            length = text.context_BLD.shape[1]
            t, r = _add_text_times(t, length), None if r is None else _add_text_times(r, length)
        return self.condition(t, text.pooled_BP, r)

    def embed(self, x_BCHW: Tensor, c_BD: Tensor, text: TextCond) -> Embedded:
        config = self.config
        rows, columns = x_BCHW.shape[-2] // config.patch, x_BCHW.shape[-1] // config.patch
        x_BND = self.patch_embed(x_BCHW)
        x_BND = x_BND + self.positions(rows, columns).to(x_BND.dtype)
        y_BLD = self.context_embed(text.context_BLD.to(x_BND.dtype))  # the loader leaves fp16 as it is stored
        bias = None if text.mask_BL is None else make_key_bias(text.mask_BL, rows * columns, x_BND.dtype)
        return Embedded(x_BND, y_BLD, c_BD, bias, rows, columns)

    def call(self, block: nn.Module, *tensors: Tensor | None) -> Any:
        """One block, with tensors only: DeepSpeed's hooks and torch.compile want modules called so."""
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, *tensors, use_reentrant=False)
        return block(*tensors)

    def output(self, final: nn.Module, x_BND: Tensor, e: Embedded) -> Tensor:
        c_BD, _ = split_condition(e.c_BD, x_BND.shape[1], e.y_BLD.shape[1])
        return unpatchify(final(x_BND, c_BD), e.rows, e.columns, self.config.patch)


def _add_text_times(t_BN: Tensor, length: int) -> Tensor:
    return torch.cat([t_BN, t_BN.mean(1, keepdim=True).expand(-1, length)], dim=1)
