"""What is written down about data: fingerprints, the manifest that proves a shard, and a dataset's dataset.json."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.formats.layout import SampleLayout
from infra import storage
from infra.errors import UserError
from model.encoders.text import TextSpec
from model.encoders.vae import Latents

DATASET_FILE = "dataset.json"
FORMAT = 1


def canonical_json(value: object) -> bytes:
    """One byte string per value: keys sorted, no spaces, dataclasses as objects."""

    def plain(item: object) -> object:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
        if isinstance(item, frozenset | set):
            return sorted(item)
        raise TypeError(f"{type(item).__name__} has no canonical form")

    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=plain).encode()


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

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "ColumnPart":
        return ColumnPart(**{**data, "rows": tuple((first, behind) for first, behind in data["rows"])})


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
    """Written last and only if absent: what it names is complete. `counts` are rows by status."""

    stage: str
    fingerprint: str
    unit: str
    parts: tuple[ColumnPart, ...]
    counts: Mapping[str, int]
    code_version: str = ""
    created: str = ""

    def to_bytes(self) -> bytes:
        raw = vars(self) | {"parts": [vars(part) for part in self.parts]}  # asdict() would copy every range of rows
        return json.dumps(raw, indent=1).encode() + b"\n"

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> "Manifest":
        parts = tuple(ColumnPart.from_json(part) for part in raw["parts"])
        return Manifest(**{**raw, "parts": parts})

    @staticmethod
    def from_bytes(data: bytes, uri: str) -> "Manifest":
        try:
            return Manifest.from_json(json.loads(data))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{uri}: not a manifest ({error}): delete it and run the same command again") from error


@dataclass(frozen=True)
class VaeMeta:
    """How stored moments become network inputs: (latent - shift) * scale, at 1/factor of the pixels."""

    checkpoint: str
    channels: int
    factor: int
    shift: float
    scale: float

    @property
    def latents(self) -> Latents:
        return Latents(self.channels, self.factor, self.shift, self.scale)


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
    vae: VaeMeta
    resolution: int
    captions: tuple[str, ...]
    columns: Mapping[str, str]
    splits: Mapping[str, SplitInfo]
    counts: Mapping[str, int] = field(default_factory=dict)
    code_version: str = ""
    int8_seats: tuple[str, ...] = ()
    rejected: str = ""  # the table of dead letters; "" where there is none (pairs, older data)
    settings: Mapping[str, Any] = field(default_factory=dict)  # what the fingerprints of training's columns stand for

    @property
    def encoding(self) -> str:
        """Fingerprint of everything a sample's bytes depend on apart from the images and captions themselves."""
        return encoding_fingerprint(
            self.text_spec, self.vae, self.resolution, self.captions, self.columns, self.int8_seats
        )

    def layout(self, bucket: str) -> SampleLayout:
        """How the samples of a bucket lie in bytes."""
        height, width = (int(side) // self.vae.factor for side in bucket.split("x"))
        shape = (2 * self.vae.channels, height, width)
        return SampleLayout(self.text_spec, self.captions, shape, self.int8_seats)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the content: the encoding and the content-addressed index of each split."""
        return fingerprint({"encoding": self.encoding, "splits": {k: v.index for k, v in self.splits.items()}})

    def to_bytes(self) -> bytes:
        raw = dataclasses.asdict(self) | {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "encoding": self.encoding,
            "text_spec": self.text_spec.to_json(),
        }
        return json.dumps(raw, indent=1, sort_keys=True).encode() + b"\n"


def encoding_fingerprint(
    text_spec: TextSpec,
    vae: VaeMeta,
    resolution: int,
    captions: tuple[str, ...],
    columns: Mapping[str, str],
    int8_seats: tuple[str, ...] = (),
) -> str:
    made_by = {name: value for name, value in columns.items() if name == "latents" or name.startswith("text_")}
    found = [FORMAT, text_spec.to_json(), vae, resolution, captions, made_by]
    return fingerprint([*found, int8_seats] if int8_seats else found)


def rejected_split(split: str) -> str:
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
    try:
        raw: dict[str, Any] = json.loads(storage.read_bytes(path))
        if raw["format"] != FORMAT:
            raise UserError(f"{path}: format {raw['format']}, this version reads {FORMAT}: pack the dataset again")
        return DatasetInfo(
            text_spec=TextSpec.from_json(raw["text_spec"]),
            vae=VaeMeta(**raw["vae"]),
            resolution=raw["resolution"],
            captions=tuple(raw["captions"]),
            columns=raw["columns"],
            splits={name: SplitInfo(**split) for name, split in raw["splits"].items()},
            counts=raw["counts"],
            code_version=raw["code_version"],
            int8_seats=tuple(raw.get("int8_seats", ())),
            rejected=raw.get("rejected", ""),
            settings=raw.get("settings", {}),
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a dataset description ({error}): run the pipeline's pack again") from error
