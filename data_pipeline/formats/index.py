"""The index of a dataset: per split a table of training shards, beside each shard a table of its rows."""
# Shapes: R rows of one shard, S captions x seats.

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from data_pipeline.formats.parquet_io import decode_table, encode_table
from infra import storage
from infra.errors import UserError


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One training shard; `tar` and `rows` (its table of rows) are relative to the dataset's root."""

    tar: str
    rows: str
    bucket: str
    num_samples: int
    num_bytes: int
    sha256: str
    rows_sha256: str
    encoding: str
    generation: int = 0

    def __post_init__(self) -> None:
        for name in ("bucket", "encoding"):  # the same in many of them: held in memory once
            object.__setattr__(self, name, sys.intern(getattr(self, name)))


@dataclass(frozen=True)
class ShardRows:
    """Rows of one shard. `offset` and `size` delimit a sample's data region inside the tar."""

    keys: Sequence[str]
    captions: dict[str, Sequence[str]]
    offset_R: np.ndarray
    size_R: np.ndarray
    checksum_R: np.ndarray
    tokens_RS: np.ndarray

    def __len__(self) -> int:
        return len(self.offset_R)


def encode_rows(rows: ShardRows) -> bytes:
    """A shard's table of rows as parquet."""
    columns: dict[str, object] = {
        "key": pa.array(rows.keys, pa.string()),
        "offset": pa.array(rows.offset_R, pa.int64()),
        "size": pa.array(rows.size_R, pa.int64()),
        "checksum": pa.array(rows.checksum_R, pa.uint64()),
        "tokens": pa.FixedSizeListArray.from_arrays(
            pa.array(rows.tokens_RS.reshape(-1), pa.int16()), rows.tokens_RS.shape[1]
        ),
    }
    columns |= {f"caption_{name}": pa.array(texts, pa.string()) for name, texts in rows.captions.items()}
    return encode_table(pa.table(columns))


def read_rows_table(uri: str) -> pa.Table:
    """A shard's table of rows as it is stored."""
    return decode_table(storage.read_bytes(uri), uri)


def decode_rows(data: bytes, uri: str) -> ShardRows:
    table = decode_table(data, uri)
    try:
        tokens = table["tokens"].combine_chunks()
        return ShardRows(
            keys=table["key"].to_pylist(),
            captions={
                name.removeprefix("caption_"): table[name].to_pylist()
                for name in table.column_names
                if name.startswith("caption_")
            },
            offset_R=table["offset"].to_numpy(),
            size_R=table["size"].to_numpy(),
            checksum_R=table["checksum"].to_numpy(),
            tokens_RS=tokens.flatten().to_numpy().reshape(len(table), -1),
        )
    except KeyError as error:
        raise UserError(
            f"{uri}: no column {error}: not a table of rows; run `python -m data_pipeline verify` on its dataset"
        ) from error


def write_split(uri: str, split: str, entries: Sequence[ShardEntry]) -> str:
    """Put a split's table of shards under a content-addressed name; returns the name relative to `uri`."""
    ordered = sorted(entries, key=lambda e: (e.bucket, e.generation, e.sha256))
    names = ShardEntry.__dataclass_fields__
    table = pa.table({name: pa.array([getattr(entry, name) for entry in ordered]) for name in names})
    data = encode_table(table)
    name = f"index/{split}-{storage.sha256_hex(data)[:16]}.parquet"
    storage.write_bytes(storage.join(uri, name), data)
    return name


def read_split(uri: str, name: str) -> list[ShardEntry]:
    """The entries that `write_split` wrote."""
    path = storage.join(uri, name)
    return [ShardEntry(**line) for line in decode_table(storage.read_bytes(path), path).to_pylist()]
