"""From stored bytes straight into a batch: caption choice, encoder dropout and posterior noise, keyed by position."""
# Shapes: B batch, C latent channels, H and W latent height and width, L text tokens, D context width, P pooled width,
# S captions x seats.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import LatentBatch
from data_pipeline.index import ShardRows
from data_pipeline.layout import SampleLayout, Slots
from data_pipeline.schema import VaeMeta
from infra.errors import UserError, nearest
from model.seeding import keyed_normal, keyed_uniform
from model.text import TextCond, TextSpec

Posterior = Literal["sample", "mean"]
Spread = Callable[[int, Callable[[range], None]], None]  # (count, work): work on parts of range(count)


@dataclass(frozen=True)
class Draws:
    """How samples are made into inputs. `caption_weights` are renormalised over the captions a sample has."""

    seed: int
    caption_weights: Mapping[str, float]
    encoder_dropout: float
    posterior: Posterior = "sample"

    def check(self, captions: Sequence[str]) -> None:
        for name, weight in self.caption_weights.items():
            if name not in captions:
                raise UserError(f"caption {name!r} is not in this dataset, which has {', '.join(captions)}"
                                f"{nearest(name, captions)}")  # fmt: skip
            if weight < 0:
                raise UserError(f"caption weight {name}={weight} is negative")
        if not sum(self.caption_weights.values()) > 0:
            raise UserError("caption weights sum to 0: give at least one caption a positive weight")
        if not 0 <= self.encoder_dropout <= 1:
            raise UserError(f"encoder_dropout={self.encoder_dropout} is not a probability")


@dataclass(frozen=True)
class _Seat:
    """Where one encoder's output lands in the context and the pooled vector."""

    seat: str
    start: int
    tokens: int
    channel: int
    width: int
    pooled_at: int
    pooled: int


def _seats(spec: TextSpec) -> dict[str, _Seat]:
    """CLIP seats side by side on channels, T5 behind them along the sequence: the placement of model.text.assemble."""
    seats: dict[str, _Seat] = {}
    channel = pooled_at = 0
    for e in spec.clip:
        seats[e.seat] = _Seat(e.seat, 0, e.tokens, channel, e.width, pooled_at, e.pooled)
        channel, pooled_at = channel + e.width, pooled_at + e.pooled
    if spec.t5 is not None:
        seats["t5"] = _Seat("t5", spec.clip_tokens, spec.t5.tokens, 0, spec.t5.width, 0, 0)
    return seats


class Collator:
    """Makes LatentBatch objects for one text spec, VAE and set of captions."""

    def __init__(
        self, text_spec: TextSpec, vae: VaeMeta, captions: tuple[str, ...], int8_seats: tuple[str, ...] = ()
    ) -> None:
        self._spec, self._vae, self._captions, self._int8 = text_spec, vae, captions, int8_seats
        self._seats = _seats(text_spec)

    def layout(self, latent_shape: tuple[int, int, int]) -> SampleLayout:
        channels, height, width = latent_shape
        return SampleLayout(self._spec, self._captions, (2 * channels, height, width), self._int8)

    @torch.inference_mode(False)  # its threads write into the batch, which they may not where it is an inference tensor
    def collate(
        self,
        positions: np.ndarray,
        rows: Sequence[tuple[ShardRows, int]],
        read: Callable[[int], np.ndarray],
        spread: Spread,
        *,
        latent_shape: tuple[int, int, int],
        draws: Draws,
    ) -> LatentBatch:
        """`rows[b]` is (table, row number) and `read(b)` the data region of the sample at `positions[b]`.

        `spread` shares the samples out to threads; each is read, placed and forgotten, so that it stays in the cache.
        """
        layout = self.layout(latent_shape)
        tokens_BS = np.stack([table.tokens_RS[row] for table, row in rows])
        slots, caption_B = layout.offsets(tokens_BS), self._choose_captions(positions, tokens_BS, draws)
        position_B = torch.from_numpy(positions.astype(np.int64))
        text = _Text(self._spec, self._seats, self._int8, tokens_BS, slots, caption_B)
        text.drop(position_B, draws)
        latent_BCHW = torch.empty(len(rows), *latent_shape)

        def fill(part: range) -> None:
            moments = np.empty((len(part), *layout.moments_shape), np.float16)
            flat = moments.reshape(len(part), -1).view(np.uint8)
            for at, b in enumerate(part):
                data = read(b)
                if len(data) != slots.size_R[b]:
                    raise UserError("samples of other sizes than the dataset's layout gives: pack it again")
                flat[at] = data[slots.moments_R[b] : slots.moments_R[b] + flat.shape[1]]
                text.place(b, data)
            mine = slice(part.start, part.stop)
            latent_BCHW[mine] = self._latents(torch.from_numpy(moments), position_B[mine], draws)

        spread(len(rows), fill)
        return LatentBatch(
            latent_BCHW=latent_BCHW,
            text=text.cond(),
            positions=position_B,  # type: ignore[arg-type]
            keys=[table.keys[row] for table, row in rows],
            captions=[table.captions[self._captions[c]][row] for (table, row), c in zip(rows, caption_B)],
        )

    def _latents(self, moments: Tensor, position_B: Tensor, draws: Draws) -> Tensor:
        """Sampled (or the mean) and normalised."""
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        if draws.posterior == "mean":
            noise_BCHW = torch.zeros(len(moments), *shape)
        else:
            noise_BCHW = keyed_normal(draws.seed, position_B, "posterior", shape)
        latents = self._vae.latents
        return latents.normalise(latents.sample(moments, noise_BCHW))

    def _choose_captions(self, positions: np.ndarray, tokens_BS: np.ndarray, draws: Draws) -> np.ndarray:
        """Index of the caption of each sample, by weight among those it has."""
        seats = len(self._spec.encoders)
        has = tokens_BS.reshape(len(positions), len(self._captions), seats).max(2) > 0
        wanted = np.array([draws.caption_weights.get(name, 0.0) for name in self._captions])
        weight = np.where(has, wanted, 0.0)
        # a sample that has none of the wanted captions takes whichever it has
        weight = np.where(weight.sum(1, keepdims=True) > 0, weight, has.astype(float))
        edges = np.cumsum(weight, 1)
        u = keyed_uniform(draws.seed, torch.from_numpy(positions), "caption").numpy()
        return np.minimum((u[:, None] * edges[:, -1:] >= edges).sum(1), len(self._captions) - 1)


class _Text:
    """A batch's text while it is filled: the same as model.text.assemble, without the copies in between."""

    def __init__(
        self,
        spec: TextSpec,
        seats: Mapping[str, _Seat],
        int8: Sequence[str],
        tokens_BS: np.ndarray,
        slots: Slots,
        caption_B: np.ndarray,
    ) -> None:
        self._spec, self._seats, self._int8 = spec, seats, int8
        self._tokens_BS, self._slots, self._caption_B = tokens_BS, slots, caption_B
        batch = len(caption_B)
        # numpy asks for huge pages, torch does not: 80 MB in small pages cost more than everything else here
        self._context_BLD = torch.from_numpy(np.zeros((batch, spec.context_tokens, spec.context_width), np.float32))
        self._pooled_BP = np.zeros((batch, spec.pooled_width), np.float32)
        self._mask_BL = np.zeros((batch, spec.context_tokens), bool)
        self._dropped_BE = np.zeros((batch, len(spec.encoders)), bool)

    def drop(self, position_B: Tensor, draws: Draws) -> None:
        """Each encoder on its own, keyed by position; what is dropped is never touched."""
        for number, encoder in enumerate(self._spec.encoders):
            u = keyed_uniform(draws.seed, position_B, f"drop/{encoder.seat}").numpy()
            self._dropped_BE[:, number] = u < draws.encoder_dropout

    def place(self, b: int, data: np.ndarray) -> None:
        """One sample's states, from its bytes straight into the batch."""
        for number, encoder in enumerate(self._spec.encoders):
            seat = self._seats[encoder.seat]
            if self._dropped_BE[b, number]:
                self._mask_BL[b, seat.start : seat.start + seat.tokens] = True
                continue
            slot = self._caption_B[b] * len(self._spec.encoders) + number
            count, at = int(self._tokens_BS[b, slot]), int(self._slots.hidden_RS[b, slot])
            small = seat.seat in self._int8
            dtype = np.dtype(np.int8 if small else np.float16)
            hidden = data[at : at + count * seat.width * dtype.itemsize].view(dtype).reshape(count, seat.width)
            # torch widens fp16 with vector instructions; numpy takes thirty times as long
            tokens = slice(seat.start, seat.start + count)
            target = self._context_BLD[b, tokens, seat.channel : seat.channel + seat.width]
            target.copy_(torch.from_numpy(hidden))
            if small:
                at = int(self._slots.scale_RS[b, slot])
                target.mul_(torch.from_numpy(data[at : at + 4 * count].view(np.float32))[:, None])
            self._mask_BL[b, tokens] = True
            if seat.pooled:
                at = int(self._slots.pooled_RS[b, slot])
                pooled = data[at : at + 4 * seat.pooled].view(np.float32)
                self._pooled_BP[b, seat.pooled_at : seat.pooled_at + seat.pooled] = pooled

    def cond(self) -> TextCond:
        mask = torch.from_numpy(self._mask_BL) if self._spec.layout == "trimmed" else None
        return TextCond(self._context_BLD, torch.from_numpy(self._pooled_BP), mask)
