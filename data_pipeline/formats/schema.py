"""What is written down about data: fingerprints, the manifest that proves a shard, and a dataset's dataset.json."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.formats.couplings import Couplings
from data_pipeline.formats.layout import SampleLayout
from infra import storage
from infra.codec import from_json, to_json
from infra.errors import UserError
from model.encoders.text import TextSpec
from model.encoders.vae import Latents

DATASET_FILE = "dataset.json"
FORMAT = 1


def canonical_json(value: object) -> bytes:
    """One byte string per value: keys sorted, no spaces, dataclasses as objects."""
    return json.dumps(to_json(value), sort_keys=True, separators=(",", ":")).encode()


def fingerprint(value: object) -> str:
    """Sixteen hex digits that name what made a column, a plan or a dataset."""
    return hashlib.sha256(canonical_json(value)).hexdigest()[:16]


def fingerprint_all(values: Iterable[object]) -> str:
    """`fingerprint([*values])`, one value at a time."""
    found = hashlib.sha256(b"[")
    for number, value in enumerate(values):
        found.update((b"," if number else b"") + canonical_json(value))
    found.update(b"]")
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class ColumnPart:
    """One data object of a manifest, relative to the dataset's root, and the rows of a shard that it holds.

    `rows` are ranges (first, behind last).
    """

    shard: str
    object: str
    sha256: str
    num_bytes: int
    num_rows: int
    rows: tuple[tuple[int, int], ...]


def to_ranges(rows: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Sorted row numbers as few (first, behind last) pairs."""
    ranges: list[tuple[int, int]] = []
    for row in sorted(rows):
        if ranges and ranges[-1][1] == row:
            ranges[-1] = ranges[-1][0], row + 1
        else:
            ranges.append((row, row + 1))
    return tuple(ranges)


def expand_ranges(ranges: Iterable[Sequence[int]]) -> list[int]:
    """The row numbers that `to_ranges` made into pairs."""
    return [row for first, behind in ranges for row in range(first, behind)]


@dataclass(frozen=True)
class Manifest:
    """Written last and only if absent: what it names is complete. `counts` are rows by status.

    `seen`: of ingest, what the source was seen to hold below its rows (`sources/seen.py`).
    """

    stage: str
    fingerprint: str
    unit: str
    parts: tuple[ColumnPart, ...]
    counts: Mapping[str, int]
    code_version: str = ""
    created: str = ""
    seen: Mapping[str, int] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        raw = to_json(self)
        if not self.seen:
            del raw["seen"]
        return json.dumps(raw, indent=1).encode() + b"\n"

    @staticmethod
    def from_bytes(data: bytes, uri: str) -> "Manifest":
        return from_json(Manifest, data, where=uri, advice="delete this manifest and run the same command again")


@dataclass(frozen=True)
class SplitInfo:
    """One split: where its table of shards is, and how many samples each bucket holds."""

    index: str
    num_samples: int
    num_shards: int
    buckets: Mapping[str, int]


@dataclass(frozen=True)
class DatasetInfo:
    """dataset.json. `columns` maps each stage to its fingerprint; `encoding` is what all shards must agree in."""

    text_spec: TextSpec
    vae: Latents
    resolution: int
    captions: tuple[str, ...]
    columns: Mapping[str, str]
    splits: Mapping[str, SplitInfo]
    counts: Mapping[str, int] = field(default_factory=dict)
    code_version: str = ""
    int8_seats: tuple[str, ...] = ()
    rejected: str = ""  # the table of dead letters; "" where there is none (pairs, older data)
    settings: Mapping[str, Any] = field(default_factory=dict)  # what the fingerprints of training's columns stand for
    couplings: Couplings | None = None  # samples are latents of a teacher's; their text lies in another dataset

    @property
    def encoding(self) -> str:
        """Fingerprint of everything a sample's bytes depend on apart from the images and captions themselves."""
        return hash_encoding(self.text_spec, self.vae, self.resolution, self.captions, self.columns, self.int8_seats)

    def layout(self, bucket: str) -> SampleLayout:
        """The byte layout of the samples of a bucket, which is named HEIGHTxWIDTH in pixels. A coupling's latent has no
        standard deviation beside it."""
        height, width = (int(side) // self.vae.factor for side in bucket.split("x"))
        shape = ((1 if self.couplings else 2) * self.vae.channels, height, width)
        return SampleLayout(self.text_spec, self.captions, shape, self.int8_seats)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the content: the encoding and the content-addressed index of each split."""
        return fingerprint({"encoding": self.encoding, "splits": {k: v.index for k, v in self.splits.items()}})

    def to_bytes(self) -> bytes:
        raw = to_json(self) | {"format": FORMAT, "fingerprint": self.fingerprint, "encoding": self.encoding}
        if self.couplings is None:
            del raw["couplings"]
        return json.dumps(raw, indent=1, sort_keys=True).encode() + b"\n"

    @staticmethod
    def from_bytes(data: bytes, uri: str) -> "DatasetInfo":
        advice = "run the pipeline's pack again"
        raw = from_json(dict[str, Any], data, where=uri, advice=advice)
        if raw.get("format") != FORMAT:
            raise UserError(f"{uri}: format {raw.get('format')}, this version reads {FORMAT}: {advice}")
        derived = ("format", "fingerprint", "encoding")
        fields = {name: value for name, value in raw.items() if name not in derived}
        return from_json(DatasetInfo, fields, where=uri, advice=advice)


def hash_encoding(
    text_spec: TextSpec,
    vae: Latents,
    resolution: int,
    captions: tuple[str, ...],
    columns: Mapping[str, str],
    int8_seats: tuple[str, ...] = (),
) -> str:
    made_by = {name: value for name, value in columns.items() if name == "latents" or name.startswith("text_")}
    found = [FORMAT, text_spec, vae, resolution, captions, made_by]
    return fingerprint([*found, int8_seats] if int8_seats else found)


def name_rejected_split(split: str) -> str:
    """The split that holds the rejected pictures of this split's preference pairs."""
    return f"{split}_rejected"


def read_dataset_info(uri: str, name: str = DATASET_FILE) -> DatasetInfo:
    """dataset.json of a dataset root; UserError when there is none or when it is of another format."""
    path = storage.join(uri, name)
    if not storage.exists(path):
        raise UserError(
            f"{uri}: no {name} there, so no finished dataset; make one with "
            f"`python -m data_pipeline run world --out {uri}`"
        )
    return DatasetInfo.from_bytes(storage.read_bytes(path), path)
