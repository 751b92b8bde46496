"""Packing: first a pack plan (training shard -> list of rows), then its shards, each restartable on its own.

A shard's id depends only on the rows in it and on what made their columns: data that is appended later leaves earlier
shards untouched.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.formats.index import ShardEntry
from data_pipeline.formats.layout import SampleLayout, TextFeatures
from data_pipeline.formats.parquet_io import write_tables
from data_pipeline.formats.schema import ColumnPart, DatasetInfo, fingerprint
from data_pipeline.packing.selections import RowSelection
from data_pipeline.packing.shards import TrainingSample, write_shard
from data_pipeline.stages.columns import read_parts
from data_pipeline.stages.encode import caption_column, text_column
from data_pipeline.stages.scratch_db import ScratchDatabase
from infra import storage
from infra.codec import from_json, to_json
from infra.errors import UserError

Proof = TypeVar("Proof")
_PLANNED = 64  # planned shards that are written down at a time


@dataclass(frozen=True)
class PlannedShard:
    """A training shard before it is written: rows of canonical shards, in order. `id` is a hash of them."""

    id: str
    split: str
    bucket: str
    rows: tuple[tuple[str, np.ndarray], ...]

    @property
    def num_rows(self) -> int:
        return sum(len(rows) for _, rows in self.rows)


def plan_shards(
    selections: Iterable[RowSelection], made_by: Mapping[str, str], *, shard_rows: Mapping[str, int]
) -> Iterator[PlannedShard]:
    """Cut each (split, bucket) into training shards of its bucket's size, rows in the order given.

    Selections of a split and bucket come one after the other; one planned shard is held at a time.
    """
    for (split, bucket), members in groupby(selections, lambda found: (found.split, found.bucket)):
        for listed in _cut_rows(members, shard_rows[bucket]):
            numbers = [(shard, rows.tolist()) for shard, rows in listed]
            yield PlannedShard(fingerprint([made_by, split, bucket, numbers]), split, bucket, listed)


def _cut_rows(selections: Iterable[RowSelection], size: int) -> Iterator[tuple[tuple[str, np.ndarray], ...]]:
    listed: list[tuple[str, np.ndarray]] = []
    room = size
    for selection in selections:
        rest = selection.row_R
        while len(rest):
            listed.append((selection.shard, rest[:room]))
            room, rest = room - len(rest[:room]), rest[room:]
            if not room:
                yield tuple(listed)
                listed, room = [], size
    if listed:
        yield tuple(listed)


class PackPlan:
    """The planned shards of a run on scratch disk, by id."""

    def __init__(self, database: ScratchDatabase) -> None:
        self._map = database.new_map("id")

    def add(self, output: PlannedShard) -> None:
        """An id stands for its rows: the same shard again changes nothing."""
        rows = [(shard, rows.tolist()) for shard, rows in output.rows]
        self._map[output.id,] = json.dumps([output.split, output.bucket, rows]).encode()

    def list_ids(self) -> Iterator[str]:
        """Ascending, as iteration gives the shards."""
        return (str(name) for (name,) in self._map)

    def __iter__(self) -> Iterator[PlannedShard]:
        for (name,), data in self._map.items():
            split, bucket, listed = json.loads(data)
            rows = tuple((shard, np.array(rows, np.int32)) for shard, rows in listed)
            yield PlannedShard(str(name), split, bucket, rows)


def write_pack_plan(root: str, outputs: Iterable[PlannedShard]) -> None:
    """The plan as it is written down before any of its shards: a table named by its hash below pack/."""
    left = iter(outputs)
    write_tables(root, "pack/plan-", map(make_plan_table, iter(lambda: list(islice(left, _PLANNED)), [])))


def make_plan_table(outputs: Sequence[PlannedShard]) -> pa.Table:
    """A line for each canonical shard of each planned shard."""
    flat = [(output, shard, rows) for output in outputs for shard, rows in output.rows]
    return pa.table(
        {
            "output": pa.array([output.id for output, _, _ in flat], pa.string()),
            "split": pa.array([output.split for output, _, _ in flat], pa.string()),
            "bucket": pa.array([output.bucket for output, _, _ in flat], pa.string()),
            "shard": pa.array([shard for _, shard, _ in flat], pa.string()),
            "rows": pa.array([rows for _, _, rows in flat], pa.list_(pa.int32())),
        }
    )


def read_planned_shards(batches: Iterable[pa.RecordBatch], wanted: AbstractSet[str]) -> Iterator[PlannedShard]:
    """Some of a plan's shards, as its table comes; lines of one shard follow each other."""
    chosen = pa.array(sorted(wanted), pa.string())
    lines = (line for batch in batches for line in batch.filter(pc.is_in(batch["output"], chosen)).to_pylist())
    for name, group in groupby(lines, lambda line: line["output"]):
        group_lines = list(group)
        rows = tuple((line["shard"], np.array(line["rows"], np.int32)) for line in group_lines)
        yield PlannedShard(name, group_lines[0]["split"], group_lines[0]["bucket"], rows)


def proof_name(encoding: str, output: str) -> str:
    """The object that proves a training shard, relative to the root."""
    return f"pack/{encoding}/{output}.json"


def read_proofs(root: str, encoding: str) -> dict[str, ShardEntry]:
    """Training shards already made, by id."""
    proofs = {}
    for uri in storage.list_files(storage.join(root, f"pack/{encoding}"), suffix=".json"):
        entry = from_json(ShardEntry, storage.read_bytes(uri), where=uri, advice="delete it and run the command again")
        proofs[uri.rsplit("/", 1)[-1].removesuffix(".json")] = entry
    return proofs


def find_lost_shards(root: str, proofs: Mapping[str, ShardEntry]) -> set[str]:
    """Proven shards of which an object is gone (one listing per folder): these are to be packed again."""
    folders = {entry.tar.rpartition("/")[0] for entry in proofs.values()}
    existing = {uri for folder in folders for uri in storage.list_files(storage.join(root, folder), recursive=False)}
    return {
        name
        for name, entry in proofs.items()
        if not {storage.join(root, entry.tar), storage.join(root, entry.rows)} <= existing
    }


def pack_shard(
    root: str, info: DatasetInfo, output: PlannedShard, parts: Mapping[str, Mapping[str, Sequence[ColumnPart]]]
) -> ShardEntry:
    """Write one training shard, its table of rows, then its proof. `parts[stage][shard]` are the columns' objects."""
    layout = info.layout(output.bucket)
    samples = (s for shard, rows in output.rows for s in _read_samples(root, layout, shard, rows.tolist(), parts))
    entry = write_shard(
        root,
        samples,
        split=output.split,
        resolution=info.resolution,
        bucket=output.bucket,
        layout=layout,
        encoding=info.encoding,
    )
    if entry.num_samples != output.num_rows:
        raise AssertionError(f"output {output.id}: {entry.num_samples} samples, the plan says {output.num_rows}")
    return put_proof(root, proof_name(info.encoding, output.id), entry, lambda proof: proof)


def put_proof(root: str, name: str, proof: Proof, find_entry: Callable[[Proof], ShardEntry | None]) -> Proof:
    """The proof that stands: of two workers that made the same shard the first one's. Where the objects that it proved
    are gone the new one takes its place, as another version of the code may have written other bytes."""
    uri, data = storage.join(root, name), json.dumps(to_json(proof), indent=1).encode() + b"\n"
    if storage.write_bytes_if_absent(uri, data):
        return proof
    standing = from_json(type(proof), storage.read_bytes(uri), where=uri, advice="delete it and run the command again")
    entry = find_entry(standing)
    if entry is None or all(storage.exists(storage.join(root, part)) for part in (entry.tar, entry.rows)):
        return standing
    storage.write_bytes(uri, data)
    return proof


def _read_samples(
    root: str,
    layout: SampleLayout,
    shard: str,
    rows: Sequence[int],
    parts: Mapping[str, Mapping[str, Sequence[ColumnPart]]],
) -> Iterable[TrainingSample]:
    made = {name: caption_column(name) for name in layout.captions if name != "original"}
    texts = {text_column(encoder.seat, caption) for caption, encoder in layout.slots}
    stages = ("measure", *made.values(), "latents", *sorted(texts))
    tables = {stage: _read_rows(root, shard, stage, parts, rows) for stage in stages}
    for row in rows:
        facts = tables["measure"][row]
        moments = np.frombuffer(tables["latents"][row]["moments"], np.float16).reshape(layout.moments_shape)
        text = {}
        for caption, encoder in layout.slots:
            states = tables[text_column(encoder.seat, caption)][row]
            if states[f"{caption}_tokens"]:
                small = encoder.seat in layout.int8_seats
                hidden = np.frombuffer(states[f"{caption}_hidden"], np.int8 if small else np.float16)
                text[caption, str(encoder.seat)] = TextFeatures(
                    hidden.reshape(-1, encoder.width),
                    np.frombuffer(states[f"{caption}_pooled"], np.float32),
                    np.frombuffer(states[f"{caption}_scale"], np.float32) if small else None,
                )
        synthetic = {name: tables[stage][row]["caption"] for name, stage in made.items()}
        captions = {"original": facts["caption"], **synthetic}
        info = {
            "source": facts["source"],
            "width": facts["width"],
            "height": facts["height"],
            "from": {"shard": shard, "row": row},
            **json.loads(facts["info"] or "{}"),
        }
        yield TrainingSample(facts["key"], moments, text, {k: v for k, v in captions.items() if v}, info)


def _read_rows(
    root: str, shard: str, stage: str, parts: Mapping[str, Mapping[str, Sequence[ColumnPart]]], rows: Sequence[int]
) -> dict[int, dict]:
    table = read_parts(root, parts[stage][shard])
    if table is None:
        raise UserError(f"{root}: column {stage} has nothing for shard {shard}: run the same command again")
    table = table.filter(pc.is_in(table["row"], value_set=pa.array(rows, pa.int32())))
    return {row["row"]: row for row in table.to_pylist()}
