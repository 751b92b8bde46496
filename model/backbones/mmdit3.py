"""MM-DiT with three sets of weights: image, CLIP tokens and T5 tokens apart (SD3 section 5.2.3, Figure 4)."""
# Shapes: B batch, N image tokens, L text tokens (M of CLIP first), D width.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from infra.errors import UserError
from model.backbones.attention import QKV, attend, join, separate
from model.backbones.layers import Modulation, scale_shift, split_condition
from model.backbones.mmdit import FinalTextStream, Stream
from model.backbones.trunk import TokenBackbone, TokenConfig
from model.encoders.text import TextCond


@dataclass(frozen=True)
class MMDiT3Config(TokenConfig):
    """`clip_tokens` is the number of CLIP tokens, which come first in the context; the T5 tokens follow."""

    clip_tokens: int = 77

    @property
    def name(self) -> str:
        return "mmdit3"

    @classmethod
    def for_text(cls, text_tokens: int, **fields: Any) -> Self:
        """A config for a context of which CLIP and T5 have one half each: 77 and 77 tokens in SD3, 16 and 16 in the
        world."""
        return cls(**{"clip_tokens": text_tokens // 2, **fields})

    def make_module(self) -> MMDiT3:
        return MMDiT3(self)

    def count_block_parameters(self) -> int:
        h, qk = self.width, self.qk_parameters
        stream, final_text = 18 * h * h + 15 * h + qk, 5 * h * h + 5 * h + qk
        return (3 * self.depth - 2) * stream + 2 * final_text

    def count_block_multiply_adds(self, tokens: int, text_tokens: int) -> int:
        h, s = self.width, tokens + text_tokens
        joint = 12 * h * h * s + 18 * h * h + 2 * h * s * s
        last = 12 * h * h * tokens + 3 * h * h * text_tokens + 10 * h * h + 2 * h * s * s
        return (self.depth - 1) * joint + last


def _read(stream: Stream | FinalTextStream, x_BND: Tensor, shift: Tensor, scale: Tensor) -> QKV:
    return stream.qkv(scale_shift(stream.norm(x_BND), shift, scale))


class MMDiT3Block(nn.Module):
    """A block: joint attention over the three streams, then an MLP for each stream."""

    def __init__(self, config: MMDiT3Config):
        super().__init__()
        self.image, self.clip, self.t5 = Stream(config), Stream(config), Stream(config)

    def forward(
        self, x_BND: Tensor, clip_BMD: Tensor, t5_BLD: Tensor, c_BD: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        streams, inputs = (self.image, self.clip, self.t5), (x_BND, clip_BMD, t5_BLD)
        conditions = split_condition(c_BD, *(x.shape[1] for x in inputs))
        adas = [stream.modulate(c) for stream, c in zip(streams, conditions, strict=True)]
        image, clip, t5 = (_read(s, x, ada[0], ada[1]) for s, x, ada in zip(streams, inputs, adas, strict=True))
        attended = separate(attend(*join(join(image, clip), t5), bias), *(x.shape[1] for x in inputs))
        outputs = []
        for stream, x, ada, seen in zip(streams, inputs, adas, attended, strict=True):
            x = torch.addcmul(x, ada[2], stream.out(seen))
            outputs.append(stream.add_mlp(x, Modulation(*ada[3:])))
        return outputs[0], outputs[1], outputs[2]


class FinalMMDiT3Block(nn.Module):
    """The last block: the two text streams give keys and values only, and have no output."""

    def __init__(self, config: MMDiT3Config):
        super().__init__()
        self.image, self.clip, self.t5 = Stream(config), FinalTextStream(config), FinalTextStream(config)

    def forward(
        self, x_BND: Tensor, clip_BMD: Tensor, t5_BLD: Tensor, c_BD: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        c_x, c_clip, c_t5 = split_condition(c_BD, x_BND.shape[1], clip_BMD.shape[1], t5_BLD.shape[1])
        shift, scale, gate, *mlp = self.image.modulate(c_x)
        image = _read(self.image, x_BND, shift, scale)
        clip = _read(self.clip, clip_BMD, *self.clip.modulate(c_clip))
        t5 = _read(self.t5, t5_BLD, *self.t5.modulate(c_t5))
        seen = attend(*join(join(image, clip), t5), bias)[:, : x_BND.shape[1]].contiguous()
        x_BND = torch.addcmul(x_BND, gate, self.image.out(seen))
        return self.image.add_mlp(x_BND, Modulation(*mlp))


class MMDiT3(TokenBackbone):
    """(x_BCHW, t, text, r) -> prediction_BCHW."""

    config: MMDiT3Config

    def __init__(self, config: MMDiT3Config):
        super().__init__(config)
        self.blocks = nn.ModuleList([MMDiT3Block(config) for _ in range(config.depth - 1)] + [FinalMMDiT3Block(config)])
        self.final = self.make_final()

    def forward(self, x_BCHW: Tensor, t: Tensor, text: TextCond, r: Tensor | None = None) -> Tensor:
        split = self.config.clip_tokens
        if not 0 < split < text.context_BLD.shape[1]:
            raise UserError(f"clip_tokens={split} leaves no two parts of {text.context_BLD.shape[1]} text tokens")
        self.check_inputs(x_BCHW, t, text, r)
        e = self.embed(x_BCHW, self.embed_times(t, text, r), text)
        x_BND, clip_BMD, t5_BLD = e.x_BND, e.y_BLD[:, :split], e.y_BLD[:, split:]
        for block in self.blocks[:-1]:
            x_BND, clip_BMD, t5_BLD = self.call(block, x_BND, clip_BMD, t5_BLD, e.c_BD, e.bias)
        x_BND = self.call(self.blocks[-1], x_BND, clip_BMD, t5_BLD, e.c_BD, e.bias)
        return self.output(self.final, x_BND, e)
