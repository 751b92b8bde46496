"""From encoder outputs to what a backbone reads: TextSpec (which encoders, which layout), TextCond, and `assemble`.

CLIP seats are concatenated on channels and zero-padded to context_width, the T5 seat follows along the sequence;
pooled vectors of the CLIP seats are concatenated (SD3, App. B.2). The encoders themselves live in networks.py.
"""
# Shapes: B batch, L text tokens, D context width, W width of one encoder, P pooled width.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import BoolTensor, Tensor

from infra.codec import from_json, to_json
from infra.errors import UserError, nearest

Seat = Literal["clip_l", "clip_g", "t5"]
Layout = Literal["padded", "trimmed"]
Convention = Literal["sd3-ref", "diffusers"]
Kind = Literal["open_clip", "clip_hf", "t5_hf", "bert_hf"]

CLIP_SEATS: tuple[str, ...] = ("clip_l", "clip_g")
SEATS: tuple[str, ...] = get_args(Seat)


@dataclass(frozen=True)
class EncoderSpec:
    """One text encoder: the seat it takes, where its weights are, and the shapes that it gives."""

    seat: Seat
    checkpoint: str
    kind: Kind
    tokens: int
    width: int
    pooled: int

    def __post_init__(self) -> None:
        for field, allowed in (("seat", get_args(Seat)), ("kind", get_args(Kind))):
            value = getattr(self, field)
            if value not in allowed:
                raise UserError(
                    f"encoder {field} {value!r} is not one of {', '.join(allowed)}{nearest(value, allowed)}"
                )
        if self.seat == "t5" and self.pooled:
            raise UserError(f"the t5 seat gives no pooled vector, but pooled={self.pooled} was stated; use 0")
        if self.tokens < 1 or self.width < 1 or self.pooled < 0:
            raise UserError(f"encoder {self.seat}: tokens={self.tokens}, width={self.width}, pooled={self.pooled}")


@dataclass(frozen=True)
class TextSpec:
    """All encoders of a run and how their outputs are laid out; JSON-able, part of the data's fingerprint."""

    encoders: tuple[EncoderSpec, ...]
    layout: Layout = "padded"
    context_width: int = 4096
    convention: Convention = "sd3-ref"
    """Which release the features equal. With T5 the reference pads to 77 tokens, diffusers' pipeline to 256."""

    def __post_init__(self) -> None:
        for field, allowed in (("layout", get_args(Layout)), ("convention", get_args(Convention))):
            value = getattr(self, field)
            if value not in allowed:
                raise UserError(f"text {field} {value!r} is not one of {', '.join(allowed)}{nearest(value, allowed)}")
        seats = [e.seat for e in self.encoders]
        if not seats or len(set(seats)) != len(seats):
            raise UserError(f"text seats {seats}: expected at least one encoder and each seat at most once")
        clip_width = sum(e.width for e in self.clip)
        widest = max([clip_width] + [e.width for e in self.encoders])
        if widest > self.context_width:
            raise UserError(f"text of width {widest} does not fit context_width {self.context_width}; raise it")
        if self.t5 is not None and self.t5.width != self.context_width:
            raise UserError(f"t5 seat of width {self.t5.width} but context_width {self.context_width}; make them equal")

    def reads_as(self, other: TextSpec) -> bool:
        """Are features the same but for the addresses of their encoders?"""
        one, two = (
            replace(spec, encoders=tuple(replace(encoder, checkpoint="") for encoder in spec.encoders))
            for spec in (self, other)
        )
        return one == two

    @property
    def clip(self) -> tuple[EncoderSpec, ...]:
        """Encoders in CLIP seats, clip_l first."""
        return tuple(e for seat in CLIP_SEATS for e in self.encoders if e.seat == seat)

    @property
    def t5(self) -> EncoderSpec | None:
        return next((e for e in self.encoders if e.seat == "t5"), None)

    @property
    def clip_tokens(self) -> int:
        """Sequence length of the CLIP part (its seats share positions)."""
        return max((e.tokens for e in self.clip), default=0)

    @property
    def context_tokens(self) -> int:
        return self.clip_tokens + (self.t5.tokens if self.t5 else 0)

    @property
    def pooled_width(self) -> int:
        return sum(e.pooled for e in self.clip)

    def to_json(self) -> dict[str, Any]:
        return to_json(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> TextSpec:
        return from_json(TextSpec, data, where="text_spec")


@dataclass(frozen=True)
class TextCond:
    """The text input of a backbone. `mask_BL` is True on tokens that may be attended to; None means all of them."""

    context_BLD: Tensor
    pooled_BP: Tensor
    mask_BL: Tensor | None = None

    def __len__(self) -> int:
        return self.context_BLD.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> TextCond:
        mask = None if self.mask_BL is None else self.mask_BL[rows]
        return TextCond(self.context_BLD[rows], self.pooled_BP[rows], mask)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, *, non_blocking: bool = False
    ) -> TextCond:
        mask = None if self.mask_BL is None else self.mask_BL.to(device, non_blocking=non_blocking)
        context, pooled = (x.to(device, dtype, non_blocking=non_blocking) for x in (self.context_BLD, self.pooled_BP))
        return TextCond(context, pooled, mask)

    def pin_memory(self) -> TextCond:
        """A copy in page-locked (pinned) memory, from which copies to a GPU are asynchronous."""
        mask = None if self.mask_BL is None else self.mask_BL.pin_memory()
        return TextCond(self.context_BLD.pin_memory(), self.pooled_BP.pin_memory(), mask)

    def zeros_like(self) -> TextCond:
        """The unconditional input `zeros` of the same shape: every encoder dropped, every position attended to."""
        mask = None if self.mask_BL is None else torch.ones_like(self.mask_BL)
        return TextCond(torch.zeros_like(self.context_BLD), torch.zeros_like(self.pooled_BP), mask)

    @staticmethod
    def cat(parts: Sequence[TextCond]) -> TextCond:
        """Concatenate along the batch; a part without mask counts as all True when another one has a mask."""
        mask = None
        if any(p.mask_BL is not None for p in parts):
            mask = torch.cat([_make_full_mask(p) if p.mask_BL is None else p.mask_BL for p in parts])
        return TextCond(torch.cat([p.context_BLD for p in parts]), torch.cat([p.pooled_BP for p in parts]), mask)


def _make_full_mask(text: TextCond) -> Tensor:
    return torch.ones(text.context_BLD.shape[:2], dtype=torch.bool, device=text.context_BLD.device)


@dataclass(frozen=True)
class EncodedText:
    """One encoder's output for a batch of captions; rows shorter than L carry anything past their length."""

    hidden_BLW: Tensor
    pooled_BP: Tensor
    length_B: Tensor

    def __len__(self) -> int:
        return self.hidden_BLW.shape[0]

    def get_row(self, index: int) -> tuple[Tensor, Tensor]:
        """(hidden_LW cut to its length, pooled_P) of one caption."""
        return self.hidden_BLW[index, : int(self.length_B[index])], self.pooled_BP[index]

    def cut_to_layout(self, index: int, layout: Layout) -> tuple[Tensor, Tensor]:
        """(hidden_LW, pooled_P) of one caption as a shard stores them: only real tokens under `trimmed`."""
        return self.get_row(index) if layout == "trimmed" else (self.hidden_BLW[index], self.pooled_BP[index])

    @staticmethod
    def stack(hidden: Sequence[Tensor], pooled: Sequence[Tensor]) -> EncodedText:
        """One batch from hidden states (L, W) of any lengths L and pooled vectors (P), one of each per caption."""
        length = torch.tensor([h.shape[0] for h in hidden])
        padded = torch.nn.utils.rnn.pad_sequence([h.float() for h in hidden], batch_first=True)
        return EncodedText(padded, torch.stack([p.float() for p in pooled]), length)


def assemble(
    spec: TextSpec, features: Mapping[str, EncodedText], dropped: Mapping[str, BoolTensor | Tensor] | None = None
) -> TextCond:
    """Encoder outputs to one TextCond of full static length; a seat missing in `features` is dropped for every row.

    A dropped encoder gives zeros, and under `trimmed` its whole stated length stays attended to (mask True).
    """
    if not features:
        raise UserError("no text features given; for the unconditional input use make_unconditional(spec, batch)")
    unknown = set(features) - {e.seat for e in spec.encoders}
    if unknown:
        raise UserError(f"text features for seats {sorted(unknown)}, which this TextSpec does not have")
    first = next(iter(features.values()))
    batch, device = len(first), first.hidden_BLW.device
    context_BLD = torch.zeros(batch, spec.context_tokens, spec.context_width, device=device)
    pooled_BP = torch.zeros(batch, spec.pooled_width, device=device)
    mask_BL = torch.zeros(batch, spec.context_tokens, dtype=torch.bool, device=device)
    channel = pooled_at = 0
    for encoder in (*spec.clip, *([spec.t5] if spec.t5 else [])):
        start = spec.clip_tokens if encoder.seat == "t5" else 0
        stop, at = start + encoder.tokens, 0 if encoder.seat == "t5" else channel
        drop_B = (dropped or {}).get(encoder.seat)
        if encoder.seat not in features:
            mask_BL[:, start:stop] = True
        else:
            hidden, pooled, real = _check_states(spec, encoder, features[encoder.seat], batch)
            if drop_B is not None:
                keep = ~drop_B.to(device)
                hidden, pooled = hidden * keep[:, None, None], pooled * keep[:, None]
                real = real | ~keep[:, None]
            context_BLD[:, start : start + hidden.shape[1], at : at + encoder.width] = hidden
            pooled_BP[:, pooled_at : pooled_at + encoder.pooled] = pooled
            mask_BL[:, start:stop] |= real
        if encoder.seat != "t5":
            channel, pooled_at = channel + encoder.width, pooled_at + encoder.pooled
    return TextCond(context_BLD, pooled_BP, mask_BL if spec.layout == "trimmed" else None)


def _check_states(spec: TextSpec, encoder: EncoderSpec, text: EncodedText, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, pooled, real tokens) of one seat in float32; padding states are zeroed under `trimmed` only."""
    rows, length, width = text.hidden_BLW.shape
    if rows != batch or width != encoder.width or length > encoder.tokens:
        raise UserError(
            f"seat {encoder.seat}: text states of shape {(rows, length, width)}, expected {batch} rows of at most "
            f"{encoder.tokens} tokens of width {encoder.width}; the data was encoded with another TextSpec"
        )
    if encoder.pooled and text.pooled_BP.shape != (batch, encoder.pooled):
        raise UserError(
            f"seat {encoder.seat}: pooled {tuple(text.pooled_BP.shape)}, expected {(batch, encoder.pooled)}"
        )
    device = text.hidden_BLW.device
    hidden = text.hidden_BLW.float()
    pooled = text.pooled_BP.float() if encoder.pooled else torch.zeros(batch, 0, device=device)
    real = torch.arange(encoder.tokens, device=device)[None] < text.length_B.to(device)[:, None]
    if spec.layout == "trimmed":
        hidden = hidden.masked_fill(~real[:, :length, None], 0.0)
    elif length != encoder.tokens:
        raise UserError(
            f"seat {encoder.seat}: {length} tokens under layout padded, which stores all {encoder.tokens}; "
            "encode again or use layout trimmed"
        )
    return hidden, pooled, real


def make_unconditional(spec: TextSpec, batch: int) -> TextCond:
    """The unconditional input `zeros`: what training drops to when every encoder is dropped."""
    mask = torch.ones(batch, spec.context_tokens, dtype=torch.bool) if spec.layout == "trimmed" else None
    context = torch.zeros(batch, spec.context_tokens, spec.context_width)
    return TextCond(context, torch.zeros(batch, spec.pooled_width), mask)
