"""Training shards: plain tars that the webdataset library and people can read, byte for byte reproducible.

Each sample is KEY.safetensors (arrays, see layout.py) and KEY.json (captions and provenance). Beside each tar lies a
table of rows with byte offsets, so that our loader never parses a tar.
"""

import json
import re
import tarfile
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from data_pipeline.formats.index import ShardEntry, ShardRows, encode_rows
from data_pipeline.formats.layout import Features, SampleLayout, checksum
from infra import storage

_BLOCK = 512  # POSIX tar: headers and data are padded to blocks, the file to records of 20 blocks
_RECORD = 20 * _BLOCK
_AROUND = 16 * 2**10  # headers of tar and safetensors, padding, the end of the tar, and where a sample comes from
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")


class TrainingSample(NamedTuple):
    """One training sample. `text[caption, seat]` are TextFeatures; `info` goes into KEY.json."""

    key: str
    moments_CHW: np.ndarray
    text: Mapping[tuple[str, str], Features]
    captions: Mapping[str, str]
    info: Mapping[str, object]


def make_plain_key(name: str) -> str:
    """A key that any tar reader takes: letters, digits, _ and -; others are replaced and a hash keeps them apart."""
    if _PLAIN_KEY.fullmatch(name):
        return name
    digest = storage.sha256_hex(name.encode("utf-8", "surrogatepass"))[:8]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', name).strip('_')[-60:]}-{digest}"


class TarBuilder:
    """A tar in memory: no times, owners or modes of the machine, so equal members give equal bytes."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self.size = 0

    def add(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its data."""
        header = tarfile.TarInfo(name)
        header.size = len(data)
        self._put(header.tobuf(tarfile.USTAR_FORMAT))
        start = self.size
        self._put(data)
        self._put(b"\0" * (-len(data) % _BLOCK))
        return start

    def finish(self) -> bytes:
        self._put(b"\0" * (2 * _BLOCK))
        self._put(b"\0" * (-self.size % _RECORD))
        return b"".join(self._pieces)

    def _put(self, data: bytes) -> None:
        self._pieces.append(data)
        self.size += len(data)


def bound_sample_bytes(layout: SampleLayout, *, caption_chars: int) -> int:
    """Bytes of a shard that no sample of this layout and of so many characters in captions can exceed."""
    tokens_RS = np.array([[encoder.tokens for _, encoder in layout.slots]])
    # JSON writes a character beyond the first 65,536 as two escapes of six
    return int(layout.offsets(tokens_RS).size_R[0]) + 12 * caption_chars + _AROUND


def build_shard(samples: Iterable[TrainingSample], layout: SampleLayout) -> tuple[bytes, ShardRows]:
    """The tar and its table of rows. A key that occurs twice gets its row number appended."""
    tar = TarBuilder()
    keys: list[str] = []
    used: set[str] = set()
    captions: dict[str, list[str]] = {name: [] for name in layout.captions}
    offsets, sizes, sums, tokens = [], [], [], []
    for sample in samples:
        key = sample.key if sample.key not in used else f"{sample.key}-r{len(keys)}"
        used.add(key)
        data, header_size, counts = layout.encode(sample.moments_CHW, sample.text)
        at = tar.add(f"{key}.safetensors", data)
        info = {"key": key, **{f"caption_{k}": v for k, v in sample.captions.items()}, **sample.info}
        tar.add(f"{key}.json", json.dumps(info, sort_keys=True).encode())
        keys.append(key)
        offsets.append(at + header_size)
        sizes.append(len(data) - header_size)
        sums.append(checksum(memoryview(data)[header_size:]))
        tokens.append(counts)
        for name in layout.captions:
            captions[name].append(sample.captions.get(name, ""))
    rows = ShardRows(
        keys=keys,
        captions=dict(captions),
        offset_R=np.array(offsets, np.int64),
        size_R=np.array(sizes, np.int64),
        checksum_R=np.array(sums, np.uint64),
        tokens_RS=np.array(tokens, np.int16).reshape(len(keys), -1),
    )
    return tar.finish(), rows


def write_shard(
    uri: str,
    samples: Iterable[TrainingSample],
    *,
    split: str,
    resolution: int,
    bucket: str,
    layout: SampleLayout,
    encoding: str,
) -> ShardEntry:
    """Put a shard and its table of rows under content-addressed names; equal samples give the same names again."""
    tar, rows = build_shard(samples, layout)
    sha, table = storage.sha256_hex(tar), encode_rows(rows)
    folder = f"{split}/{resolution}/{bucket}"
    entry = ShardEntry(
        tar=f"{folder}/{sha[:32]}.tar",
        rows=f"{folder}/{sha[:32]}.parquet",
        bucket=bucket,
        num_samples=len(rows),
        num_bytes=len(tar),
        sha256=sha,
        rows_sha256=storage.sha256_hex(table),
        encoding=encoding,
    )
    storage.write_bytes(storage.join(uri, entry.tar), tar)
    storage.write_bytes(storage.join(uri, entry.rows), table)
    return entry
