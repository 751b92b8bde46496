"""Columns: what a stage wrote for each shard, under columns/<stage>/<fingerprint>/.

A data object has a content-addressed name; the manifest names it, comes last and only if absent, and so proves it. A
zombie writer and its retry cannot mix. A shard may have several manifests, each for other rows (a loosened gate).
"""

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.formats.parquet_io import decode_table
from data_pipeline.formats.schema import ColumnPart, Manifest, to_ranges
from infra import storage
from infra.ahead import map_ahead
from infra.errors import UserError
from infra.version import code_version

_ROW_GROUP = 256  # rows
_READERS = 16  # threads that read manifests from S3


@dataclass(frozen=True)
class Column:
    """One stage's results under one fingerprint, in one dataset root."""

    root: str
    stage: str
    fingerprint: str

    @property
    def folder(self) -> str:
        return f"columns/{self.stage}/{self.fingerprint[:12]}"

    def write(
        self,
        unit: str,
        tables: Iterable[tuple[str, pa.Table]],
        *,
        number: int = 0,
        seen: Mapping[str, int] = {},
    ) -> Manifest:
        """Put one object per shard, then the manifest. When another writer was first, its manifest is returned.

        `tables` (shard, rows) are taken one by one, so that not all of them need be in memory; `seen` is read after.
        """
        parts, counts = [], Counter[str]()
        for shard, table in tables:
            parts.append(self._put(shard, table))
            counts.update(count_statuses(table))
        manifest = Manifest(
            stage=self.stage,
            fingerprint=self.fingerprint,
            unit=unit,
            parts=tuple(parts),
            counts=dict(counts),
            code_version=code_version(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seen=dict(seen),
        )
        while True:
            uri = self.uri(unit, number)
            if storage.write_bytes_if_absent(uri, manifest.to_bytes()):
                return manifest
            standing = Manifest.from_bytes(storage.read_bytes(uri), uri)
            if _list_rows(standing) == _list_rows(manifest):
                return standing
            number += 1  # a manifest with a lower number was deleted, and this one is of other rows

    def manifests(self, *, prefix: str = "") -> Iterator[tuple[str, int, bytes]]:
        """(unit, number, bytes) of the manifests of units whose names begin so, in no order; a few are held at a time.

        A unit's manifests have numbers; each holds other rows.
        """
        listed = storage.iter_files(storage.join(self.root, self.folder), suffix=".json", recursive=False)
        uris = (uri for uri in listed if uri.rpartition("/")[2].startswith(prefix))
        for uri, data in map_ahead(storage.read_bytes, uris, threads=count_readers(self.root, _READERS)):
            unit, _, number = uri.rpartition("/")[2].removesuffix(".json").rpartition(".")
            yield unit, int(number), data

    def manifest(self, unit: str, number: int, data: bytes) -> Manifest:
        """One of them; UserError where another fingerprint made it."""
        uri = self.uri(unit, number)
        manifest = Manifest.from_bytes(data, uri)
        if manifest.fingerprint != self.fingerprint:
            raise UserError(f"{uri}: made by {manifest.fingerprint}, expected {self.fingerprint}: delete the folder")
        return manifest

    def uri(self, unit: str, number: int) -> str:
        """Where a manifest lies."""
        return storage.join(self.root, self.folder, f"{unit}.{number}.json")

    def objects(self) -> Iterator[str]:
        """Names of the data objects that are there, as parts name them, in no order."""
        for uri in storage.iter_files(storage.join(self.root, self.folder, "objects"), recursive=False):
            yield f"{self.folder}/objects/{uri.rpartition('/')[2]}"

    def _put(self, shard: str, table: pa.Table) -> ColumnPart:
        out = io.BytesIO()
        # image bytes and fp16 features do not shrink: compress text columns only
        texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
        pq.write_table(
            table,
            out,
            row_group_size=_ROW_GROUP,
            compression={name: "zstd" if name in texts else "none" for name in table.column_names},
            use_dictionary=texts,
            write_statistics=False,
        )
        data = out.getvalue()
        sha = storage.sha256_hex(data)
        name = f"{self.folder}/objects/{sha[:32]}.parquet"
        storage.write_bytes(storage.join(self.root, name), data)
        return ColumnPart(shard, name, sha, len(data), len(table), to_ranges(table["row"].to_pylist()))


def count_readers(root: str, remote: int) -> int:
    """Threads that read ahead: a remote answer takes tens of milliseconds, a local one less than changing threads."""
    return remote if storage.is_remote(root) else 2


def _list_rows(manifest: Manifest) -> list[tuple[str, object]]:
    return [(part.shard, part.rows) for part in manifest.parts]


def count_statuses(table: pa.Table) -> dict[str, int]:
    """Rows by status."""
    return {item["values"]: item["counts"] for item in table["status"].value_counts().to_pylist()}


def read_part(root: str, part: ColumnPart, columns: Sequence[str] | None = None) -> pa.Table:
    """A part's rows (some columns). Reading all of it checks the hash; `verify` checks every object."""
    uri = storage.join(root, part.object)
    data = storage.read_bytes(uri)
    if len(data) != part.num_bytes or storage.sha256_hex(data) != part.sha256:
        raise UserError(f"{uri}: not the bytes that its manifest names: delete it and run the command again")
    table = decode_table(data, uri)
    return table.select(list(columns)) if columns is not None else table


def read_parts(root: str, parts: Iterable[ColumnPart], columns: Sequence[str] | None = None) -> pa.Table | None:
    """All rows of a shard's parts, by row number; a row in two parts counts once (the first). None without parts."""
    tables = [read_part(root, part, columns) for part in parts]
    if not tables:
        return None
    table = pa.concat_tables(tables)
    rows = table["row"].to_pylist()
    first = {row: at for at, row in reversed(list(enumerate(rows)))}
    return table.take(pa.array([first[row] for row in sorted(first)], pa.int64()))
