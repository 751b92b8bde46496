"""Ingest: writes a source unit as canonical shards of bounded size, each row with key, image bytes and caption.

What a source could not read is a row too, with a status that says why. From here on no row is dropped silently.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from data_pipeline.formats.schema import Manifest
from data_pipeline.packing.shards import make_plain_key
from data_pipeline.sources.captions import Caption, read_caption
from data_pipeline.sources.source import RawRow, Source, SourceUnit
from data_pipeline.stages.columns import Column

VERSION = 1
MAX_SHARD_BYTES = 512 * 2**20
_INFO_KEYS = ("url", "sha256", "original_width", "original_height", "license")


@dataclass(frozen=True)
class Ingest:
    """Writes canonical shards of at most `shard_rows` rows and about MAX_SHARD_BYTES of images."""

    shard_rows: int = 1000

    def identity(self) -> dict[str, object]:
        return {"version": VERSION, "shard_rows": self.shard_rows}

    def run(
        self, source: Source, unit: SourceUnit, column: Column, *, keep_bytes: int = 0
    ) -> tuple[Manifest, dict[str, pa.Table]]:
        """Read the unit, write its shards one by one, then the manifest that names them.

        Also returns the first tables by shard name, as many as fit into `keep_bytes`: the next stages then need not
        read them again.
        """
        kept: dict[str, pa.Table] = {}

        def tables() -> Iterator[tuple[str, pa.Table]]:
            room = keep_bytes
            for number, table in enumerate(self.make_tables(source.read_rows(unit))):
                shard = f"{unit.id}-{number:03d}"
                room -= table.nbytes
                if room >= 0:
                    kept[shard] = table
                yield shard, table

        return column.write(unit.id, tables(), seen=unit.seen), kept

    def make_tables(self, rows: Iterator[RawRow]) -> Iterator[pa.Table]:
        """Canonical shards of rows as they were found."""
        for chunk in self._chunks(rows):
            table = _make_table(chunk)
            chunk.clear()
            yield table

    def _chunks(self, rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
        chunk: list[RawRow] = []
        seen: set[str] = set()
        size = 0
        for row in rows:
            if row.status == "ok" and row.key in seen:
                row = row._replace(image=None, status="duplicate_key", reason="the key occurred before in this file")
            seen.add(row.key)
            size += len(row.image or b"")
            chunk.append(row)
            if len(chunk) == self.shard_rows or size > MAX_SHARD_BYTES:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk


def _make_table(rows: list[RawRow]) -> pa.Table:
    captions = [read_caption(row.caption, row.key) for row in rows]
    problems = [("bad_caption", caption.problem) if caption.problem else ("ok", "") for caption in captions]
    judged = [problem if row.status == "ok" else (row.status, row.reason) for row, problem in zip(rows, problems)]
    return pa.table(
        {
            "row": pa.array(range(len(rows)), pa.int32()),
            "status": pa.array([status for status, _ in judged], pa.string()),
            "reason": pa.array([_encode_plain(reason) for _, reason in judged], pa.string()),
            "key": pa.array([make_plain_key(row.key) for row in rows], pa.string()),
            "source": pa.array([_encode_plain(row.key) for row in rows], pa.string()),
            "image": pa.array([row.image for row in rows], pa.large_binary()),
            "caption": pa.array([caption.text for caption in captions], pa.string()),
            "info": pa.array([_encode_info(row, caption) for row, caption in zip(rows, captions)], pa.string()),
        }
    )


def _encode_plain(text: str) -> str:
    return text.encode("utf-8", "replace").decode()[:500]


def _encode_info(row: RawRow, caption: Caption) -> str:
    more = {"captions": caption.all} if len(caption.all) > 1 else {}
    return json.dumps({key: row.info[key] for key in _INFO_KEYS if key in row.info} | more)
