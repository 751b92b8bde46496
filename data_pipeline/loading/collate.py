"""From stored bytes straight into a batch: caption choice, encoder dropout and posterior noise, keyed by position."""
# Shapes: B batch, C latent channels, H and W latent height and width, L text tokens, D context width, P pooled width,
# S captions x seats.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.formats.index import ShardRows
from data_pipeline.formats.layout import SampleLayout, SampleOffsets
from data_pipeline.loading.array_pool import ArrayPool
from data_pipeline.loading.batch import LatentBatch
from data_pipeline.loading.reader import ReadTarget
from infra.errors import UserError, nearest
from model.encoders.text import TextCond, TextSpec
from model.encoders.vae import Latents
from model.seeding import Normal, QuickNormal, keyed_uniform

Posterior = Literal["sample", "mean"]
Read = Callable[[int, Sequence[ReadTarget]], np.ndarray]  # (sample, what goes elsewhere): the rest of its data region
Lend = Callable[[tuple[int, ...], type[np.generic]], np.ndarray]  # Memory.lend
Spread = Callable[[int, Callable[[range], None]], None]  # (count, work): work on parts of range(count)

CACHED = 2**17  # numbers that are worked on at once: with what is made of them they stay in a core's cache


@dataclass(frozen=True)
class DrawSettings:
    """Settings by which stored samples become training inputs. `caption_weights` are renormalised over the captions
    that a sample has."""

    seed: int
    caption_weights: Mapping[str, float]
    encoder_dropout: float
    posterior: Posterior = "sample"
    normal: type[Normal] | type[QuickNormal] = Normal

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


def _place_seats(spec: TextSpec) -> dict[str, _Seat]:
    """CLIP seats side by side on channels, then T5 along the sequence, as model.encoders.text.assemble places them."""
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
        self, text_spec: TextSpec, vae: Latents, captions: tuple[str, ...], int8_seats: tuple[str, ...] = ()
    ) -> None:
        self._spec, self._vae, self._captions, self._int8 = text_spec, vae, captions, int8_seats
        self._seats, self._memory = _place_seats(text_spec), ArrayPool()

    def layout(self, latent_shape: tuple[int, int, int]) -> SampleLayout:
        channels, height, width = latent_shape
        return SampleLayout(self._spec, self._captions, (2 * channels, height, width), self._int8)

    @torch.inference_mode(False)  # its threads write into the batch, which they may not where it is an inference tensor
    def collate(
        self,
        positions: np.ndarray,
        rows: Sequence[tuple[ShardRows, int]],
        read: Read,
        spread: Spread,
        *,
        latent_shape: tuple[int, int, int],
        draws: DrawSettings,
    ) -> LatentBatch:
        """`rows[b]` is (table, row number) and `read(b, elsewhere)` the data region of the sample at `positions[b]`.

        `spread` shares the samples out to threads; each is read, placed and forgotten, so that it stays in the cache.
        """
        layout = self.layout(latent_shape)
        tokens_BS = np.stack([table.tokens_RS[row] for table, row in rows])
        slots, caption_B = layout.offsets(tokens_BS), self.choose_captions(positions, tokens_BS, draws)
        if any(table.size_R[row] != size for (table, row), size in zip(rows, slots.size_R)):
            raise UserError("samples of other sizes than the dataset's layout gives: pack it again")
        position_B = torch.from_numpy(positions.astype(np.int64))
        dropped_BE = self._drop(position_B, draws)
        lend = self._memory.lend
        moments, latents = (lend((len(rows), *shape), dtype) for shape, dtype in (
            (layout.moments_shape, np.float16), (latent_shape, np.float32),
        ))  # fmt: skip
        target = _Target(self._spec, self._seats, self._int8, tokens_BS, slots, caption_B, dropped_BE, moments, lend)

        def fill(part: range) -> None:
            for b in part:
                target.place(b, read(b, target.elsewhere[b]))
            # only now: between two reads of a megabyte nothing would stay in the cache
            self._sample(latents, moments, positions, part, draws)

        spread(len(rows), fill)
        return LatentBatch(
            latent_BCHW=torch.from_numpy(latents),
            text=target.text,
            positions=position_B,  # type: ignore[arg-type]
            keys=[table.keys[row] for table, row in rows],
            captions=[table.captions[self._captions[c]][row] for (table, row), c in zip(rows, caption_B)],
        )

    def _sample(
        self, latent_BCHW: np.ndarray, moments_BMHW: np.ndarray, positions: np.ndarray, part: range, draws: DrawSettings
    ) -> None:
        """Sampled (or the mean) and normalised, as many at once as stay in the cache."""
        normal, at_once = draws.normal(draws.seed, "posterior"), max(1, CACHED // moments_BMHW[0].size)
        wide = torch.empty(at_once, *moments_BMHW.shape[1:])
        for start in range(part.start, part.stop, at_once):
            some = slice(start, min(start + at_once, part.stop))
            if draws.posterior == "sample":
                normal.fill(positions[some].tolist(), latent_BCHW[some])
            else:
                latent_BCHW[some] = 0
            moments, latents = torch.from_numpy(moments_BMHW[some]), torch.from_numpy(latent_BCHW[some])
            self._vae.sample_normalised_(latents, wide[: len(moments)].copy_(moments))

    def _drop(self, position_B: Tensor, draws: DrawSettings) -> np.ndarray:
        """(B, E) bool: the text encoders that are dropped for each sample, each independently, keyed by position."""
        seats = [encoder.seat for encoder in self._spec.encoders]
        # the purpose strings are part of every run's result: another word would be another dropout
        u_EB = [keyed_uniform(draws.seed, position_B, f"drop/{seat}").numpy() for seat in seats]
        return np.stack(u_EB, 1) < draws.encoder_dropout

    def choose_captions(self, positions: np.ndarray, tokens_BS: np.ndarray, draws: DrawSettings) -> np.ndarray:
        """Index of the caption of each sample, by weight among those it has."""
        seats = len(self._spec.encoders)
        has = tokens_BS.reshape(len(positions), len(self._captions), seats).max(2) > 0
        wanted = np.array([draws.caption_weights.get(name, 0.0) for name in self._captions])
        weight = np.where(has, wanted, 0.0)
        # a sample that has none of the wanted captions takes whichever it has
        weight = np.where(weight.sum(1, keepdims=True) > 0, weight, has.astype(float))
        edges = np.cumsum(weight, 1)  # inverse of the cumulative distribution: the first edge above u decides
        u = keyed_uniform(draws.seed, torch.from_numpy(positions), "caption").numpy()
        return np.minimum((u[:, None] * edges[:, -1:] >= edges).sum(1), len(self._captions) - 1)


class _Copy(NamedTuple):
    """An array of a sample's bytes (`dtype`, from `at` on) and its place in the batch; int8 has its scales, too."""

    at: int
    dtype: np.dtype
    target: np.ndarray
    scale_at: int | None = None


class _Target:
    """Where each array of each sample goes: its moments, and its text as model.encoders.text.assemble places it.

    The context stays fp16 as it is stored; only where int8 is about it is fp32. All is laid out beforehand: between two
    samples of a megabyte each every line of Python is slow, as it has left the cache.
    """

    def __init__(
        self,
        spec: TextSpec,
        seats: Mapping[str, _Seat],
        int8: Sequence[str],
        tokens_BS: np.ndarray,
        slots: SampleOffsets,
        caption_B: np.ndarray,
        dropped_BE: np.ndarray,
        moments_BMHW: np.ndarray,
        lend: Lend,
    ) -> None:
        batch = len(caption_B)
        context_BLD = lend((batch, spec.context_tokens, spec.context_width), np.float32 if int8 else np.float16)
        pooled_BP = np.zeros((batch, spec.pooled_width), np.float32)
        mask_BL = np.zeros((batch, spec.context_tokens), bool)
        self.elsewhere: list[list[ReadTarget]] = [[] for _ in range(batch)]
        self._copies: list[list[_Copy]] = [[] for _ in range(batch)]
        self._zeros: list[list[np.ndarray]] = [[] for _ in range(batch)]
        for b, at in enumerate(slots.moments_R.tolist()):
            self._add(b, _Copy(at, moments_BMHW.dtype, moments_BMHW[b]))
        for number, encoder in enumerate(spec.encoders):
            seat, small = seats[encoder.seat], encoder.seat in int8
            tokens, slot_B = slice(seat.start, seat.start + seat.tokens), caption_B * len(spec.encoders) + number
            states_BLW = context_BLD[:, tokens, seat.channel : seat.channel + seat.width]
            count_B = np.where(dropped_BE[:, number], 0, tokens_BS[np.arange(batch), slot_B])
            mask_BL[:, tokens] |= (np.arange(seat.tokens) < count_B[:, None]) | dropped_BE[:, number, None]
            hidden_B, scale_B, pooled_B = (
                offset_RS[np.arange(batch), slot_B].tolist()
                for offset_RS in (slots.hidden_RS, slots.scale_RS, slots.pooled_RS)
            )
            dtype = np.dtype(np.int8 if small else np.float16)
            for b, count in enumerate(count_B.tolist()):
                if count < seat.tokens:
                    self._zeros[b].append(states_BLW[b, count:])
                if count:
                    self._add(b, _Copy(hidden_B[b], dtype, states_BLW[b, :count], scale_B[b] if small else None))
                if count and seat.pooled:
                    target_P = pooled_BP[b, seat.pooled_at : seat.pooled_at + seat.pooled]
                    self._copies[b].append(_Copy(pooled_B[b], target_P.dtype, target_P))
        mask = torch.from_numpy(mask_BL) if spec.layout == "trimmed" else None
        self.text = TextCond(torch.from_numpy(context_BLD), torch.from_numpy(pooled_BP), mask)

    def _add(self, b: int, copy: _Copy) -> None:
        """Read straight into its place where that is one piece, of the same bytes and of whole words."""
        target = copy.target
        same = target.flags.c_contiguous and target.dtype == copy.dtype
        if same and copy.at % 8 == target.nbytes % 8 == 0:
            self.elsewhere[b].append(ReadTarget(copy.at, target.reshape(-1).view(np.uint8)))
        else:
            self._copies[b].append(copy)

    def place(self, b: int, data: np.ndarray) -> None:
        """One sample's other arrays, from its bytes into the batch, and zeros where there are none."""
        for target in self._zeros[b]:
            target.fill(0)
        for at, dtype, target, scale_at in self._copies[b]:
            stored = data[at : at + target.size * dtype.itemsize].view(dtype).reshape(target.shape)
            if target.dtype == dtype:
                target[...] = stored
                continue
            # torch widens fp16 with vector instructions; numpy takes thirty times as long
            wide_LW = torch.from_numpy(target)
            wide_LW.copy_(torch.from_numpy(stored))
            if scale_at is not None:
                wide_LW.mul_(torch.from_numpy(data[scale_at : scale_at + 4 * len(target)].view(np.float32))[:, None])
