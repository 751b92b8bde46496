"""The bytes of one training sample: which arrays it holds, in which order, so that an index alone can find them.

A sample is a safetensors file: fp32 pooled vectors and scales first (alignment), then the fp16 moments, then the states
of each caption and encoder (fp16, or int8 with a scale per token), cut to the tokens that are stored. Absent captions
have 0 tokens and no bytes.
"""
# Shapes: R rows, S captions x seats (caption-major), C channels, H and W latent height and width, L text tokens.

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from model.encoders.text import EncoderSpec, TextSpec

_DTYPES = {"<f4": "F32", "<f2": "F16", "|i1": "I8"}


class TextFeatures(NamedTuple):
    """One caption's output of one encoder; with `scale_L` the states are int8 and mean hidden_LW * scale_L[:, None]."""

    hidden_LW: np.ndarray
    pooled_P: np.ndarray
    scale_L: np.ndarray | None = None


Features = TextFeatures | tuple[np.ndarray, np.ndarray]


def quantise_tokens(hidden_LW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int8 states, fp32 scale per token): the largest value of each token becomes 127."""
    # absolute maximum per row, as in vector-wise quantisation (LLM.int8, Dettmers et al. 2022)
    values = hidden_LW.astype(np.float32)
    scale_L = np.abs(values).max(1, initial=0) / 127
    scale_L = np.where(scale_L > 0, scale_L, 1).astype(np.float32)
    return np.rint(values / scale_L[:, None]).astype(np.int8), scale_L


@dataclass(frozen=True)
class SampleOffsets:
    """Byte offsets inside a sample's data region, for R rows; -1 where a caption is absent."""

    moments_R: np.ndarray
    pooled_RS: np.ndarray
    scale_RS: np.ndarray
    hidden_RS: np.ndarray
    size_R: np.ndarray


@dataclass(frozen=True)
class SampleLayout:
    """Names, order and offsets of a sample's arrays, for one text spec, set of captions and latent shape."""

    text_spec: TextSpec
    captions: tuple[str, ...]
    moments_shape: tuple[int, int, int]
    int8_seats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for encoder in self.text_spec.encoders:
            if encoder.seat in self.int8_seats and encoder.width % 2:
                raise ValueError(f"{encoder.seat}: int8 states of odd width {encoder.width} would misalign fp16 ones")

    @property
    def encoders(self) -> tuple[EncoderSpec, ...]:
        return self.text_spec.encoders

    @property
    def moments_size(self) -> int:
        """Bytes of the moments."""
        return 2 * int(np.prod(self.moments_shape))

    @property
    def slots(self) -> list[tuple[str, EncoderSpec]]:
        """(caption, encoder) of each column of a tokens table."""
        return [(caption, encoder) for caption in self.captions for encoder in self.encoders]

    def offsets(self, tokens_RS: np.ndarray) -> SampleOffsets:
        """Byte offsets of each array of each row; they follow from the token counts alone."""
        tokens_RS = tokens_RS.astype(np.int64)
        present_RS = tokens_RS > 0
        pooled_size_RS = present_RS * np.array([encoder.pooled * 4 for _, encoder in self.slots])
        small = np.array([encoder.seat in self.int8_seats for _, encoder in self.slots])
        scale_size_RS = tokens_RS * small * 4
        hidden_size_RS = tokens_RS * np.array([encoder.width for _, encoder in self.slots]) * np.where(small, 1, 2)
        scales_R = pooled_size_RS.sum(1)
        moments_R = scales_R + scale_size_RS.sum(1)
        pooled_RS = np.cumsum(pooled_size_RS, 1) - pooled_size_RS
        scale_RS = scales_R[:, None] + np.cumsum(scale_size_RS, 1) - scale_size_RS
        hidden_RS = (moments_R + self.moments_size)[:, None] + np.cumsum(hidden_size_RS, 1) - hidden_size_RS
        return SampleOffsets(
            moments_R=moments_R,
            pooled_RS=np.where(present_RS, pooled_RS, -1),
            scale_RS=np.where(present_RS & small, scale_RS, -1),
            hidden_RS=np.where(present_RS, hidden_RS, -1),
            size_R=moments_R + self.moments_size + hidden_size_RS.sum(1),
        )

    def encode(self, moments_CHW: np.ndarray, text: Mapping[tuple[str, str], Features]) -> tuple[bytes, int, list[int]]:
        """(safetensors bytes, header length, tokens per slot); `text[caption, seat]` are TextFeatures."""
        if moments_CHW.shape != self.moments_shape:
            raise ValueError(f"moments {moments_CHW.shape}, expected {self.moments_shape}")
        pooled, scales, hidden, tokens = [], [], [], []
        for caption, encoder in self.slots:
            if (caption, encoder.seat) not in text:
                tokens.append(0)
                continue
            hidden_LW, pooled_P, scale_L = TextFeatures(*text[caption, encoder.seat])
            if not 0 < len(hidden_LW) <= encoder.tokens or hidden_LW.shape[1] != encoder.width:
                raise ValueError(f"{encoder.seat}: states {hidden_LW.shape}, at most {(encoder.tokens, encoder.width)}")
            tokens.append(len(hidden_LW))
            name = f"{caption}.{encoder.seat}"
            if encoder.seat in self.int8_seats:
                if scale_L is None:
                    hidden_LW, scale_L = quantise_tokens(hidden_LW)
                scales.append((f"{name}.scale", scale_L.astype("<f4")))
                hidden.append((f"{name}.hidden", hidden_LW.astype("|i1")))
            else:
                hidden.append((f"{name}.hidden", hidden_LW.astype("<f2")))
            if encoder.pooled:
                pooled.append((f"{name}.pooled", pooled_P.astype("<f4")))
        moments = ("moments", moments_CHW.astype("<f2"))
        header, data = pack_safetensors([*pooled, *scales, moments, *hidden])
        return header + data, len(header), tokens


def pack_safetensors(arrays: Sequence[tuple[str, np.ndarray]]) -> tuple[bytes, bytes]:
    """(header, data) of a safetensors file that keeps the given order, which the library's own writer does not."""
    header: dict[str, dict[str, object]] = {}
    at = 0
    for name, array in arrays:
        dtype = _DTYPES[array.dtype.str if array.itemsize == 1 else array.dtype.newbyteorder("<").str]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format allows spaces behind the header; so the data begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text, b"".join(np.ascontiguousarray(a).tobytes() for _, a in arrays)


def checksum(*pieces: bytes | memoryview) -> int:
    """Sum of the 64-bit words, modulo 2**64: any flipped bit or zeroed page shows, at the speed of memory.

    Of several pieces all but the last are whole words.
    """
    total = 0
    for data in pieces:
        body = len(data) & ~7
        words = np.frombuffer(data, "<u8", count=body // 8)
        total += int(words.sum(dtype=np.uint64)) + int.from_bytes(data[body:], "little")
    return total & (2**64 - 1)
