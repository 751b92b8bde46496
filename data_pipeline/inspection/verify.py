"""Checks that a dataset is what it says: every object's hash, every row's bytes, every count, no row twice or lost."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from data_pipeline.formats.index import ShardEntry, decode_rows, read_split
from data_pipeline.formats.layout import checksum
from data_pipeline.formats.parquet_io import decode_table
from data_pipeline.formats.schema import ColumnPart, DatasetInfo, Manifest, name_rejected_split, read_dataset_info
from data_pipeline.loading.loader import open_dataset
from data_pipeline.loading.pairs import RejectedLatents
from data_pipeline.stages.columns import count_statuses
from data_pipeline.stages.stage import OK
from infra import storage
from infra.errors import UnavailableError, UserError
from infra.log import Progress


@dataclass
class VerificationResult:
    """What was checked and what was wrong with it."""

    objects: int = 0
    num_bytes: int = 0
    samples: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def verify_dataset(uri: str, *, columns: bool = True) -> VerificationResult:
    """Read everything once. `columns` also checks what the stages wrote, not only the training shards."""
    info = read_dataset_info(uri)
    findings = VerificationResult()
    tasks: list[tuple[str, object]] = []
    origins: Counter[tuple[str, int]] = Counter()
    for split, about in info.splits.items():
        path = storage.join(uri, about.index)
        entries = read_split(uri, about.index)
        if sum(entry.num_samples for entry in entries) != about.num_samples:
            findings.problems.append(f"{path}: other sample counts than dataset.json")
        tasks += [(split, entry) for entry in entries]
    parts = list(_list_parts(uri, info)) if columns else []
    tasks += [("", part) for part in {part.object: part for _, part in parts}.values()]
    with ThreadPoolExecutor(4) as pool, Progress(len(tasks), "objects", desc="verify") as progress:
        for problems, num_bytes, split, places in pool.map(lambda task: _check(uri, info, *task), tasks):
            findings.problems += problems
            findings.objects += 1
            findings.num_bytes += num_bytes
            if split:
                findings.samples[split] = findings.samples.get(split, 0) + len(places)
            origins.update(place for place in places if place is not None)
            progress.update(1, problems=len(findings.problems))
    twice = [place for place, count in origins.items() if count > 1]
    if twice:
        findings.problems.append(f"{len(twice)} rows were packed more than once, e.g. {twice[0][0]} row {twice[0][1]}")
    for split in info.splits:
        if not findings.problems and name_rejected_split(split) in info.splits:
            try:
                RejectedLatents(open_dataset(uri, split=split))
            except UnavailableError:
                raise
            except UserError as error:
                findings.problems.append(str(error))
    if info.rejected and not findings.problems:
        ingested = {part.shard: part.num_rows for stage, part in parts if stage == "ingest"}
        findings.problems += _check_rejected(uri, info, origins, ingested)
    total, ok = sum(findings.samples.values()), info.counts.get("ok", 0)
    if not findings.problems and total != ok:
        findings.problems.append(f"{uri}: {total} samples in the shards, but {ok} rows are ok")
    return findings


def _list_parts(uri: str, info: DatasetInfo) -> Iterator[tuple[str, ColumnPart]]:
    for stage, fingerprint in info.columns.items():
        folder = storage.join(uri, "columns", stage, fingerprint[:12])
        for name in storage.list_files(folder, suffix=".json", recursive=False):
            for part in Manifest.from_bytes(storage.read_bytes(name), name).parts:
                yield stage, part


def _check_rejected(
    uri: str, info: DatasetInfo, samples: Counter[tuple[str, int]], ingested: Mapping[str, int]
) -> list[str]:
    """Every ingested row is one sample or one dead letter. `ingested`: rows by shard, empty if columns are not read."""
    path = storage.join(uri, info.rejected)
    try:
        data = storage.read_bytes(path)
        if storage.sha256_hex(data)[:16] not in info.rejected:
            return [f"{path}: other bytes than its name says"]
        table = decode_table(data, path)
    except UnavailableError:
        raise
    except UserError as error:
        return [str(error)]
    dead = Counter(zip(table["shard"].to_pylist(), table["row"].to_pylist()))
    both = sorted(samples.keys() & dead.keys())
    problems = [f"{path}: {len(both)} dead letters are samples, too, e.g. {both[0]}"] if both else []
    if len(dead) != len(table):
        problems.append(f"{path}: {len(table) - len(dead)} dead letters are listed twice")
    counted = {status: count for status, count in info.counts.items() if status != OK}
    if count_statuses(table) != counted:
        problems.append(f"{path}: other dead letters than dataset.json counts ({counted})")
    ended = Counter(shard for shard, _ in [*samples, *dead])
    # shards of the column that neither has are of files that were changed or taken away since
    astray = [shard for shard, count in ended.items() if ingested and count != ingested.get(shard)]
    if astray:
        shard = min(astray)
        rows = f"{ended[shard]} of {ingested.get(shard, 0)} rows"
        problems.append(f"{uri}: shard {shard}: {rows} ended as sample or dead letter (so in {len(astray)} shards)")
    return problems


def _check(uri: str, info: DatasetInfo, split: str, item: object) -> tuple[list[str], int, str, list]:
    """(problems, bytes read, split, origin of each sample)."""
    try:
        if isinstance(item, ColumnPart):
            data = storage.read_bytes(storage.join(uri, item.object))
            wrong = _check_hash(storage.join(uri, item.object), data, item.sha256)
            return wrong, len(data), "", []
        assert isinstance(item, ShardEntry)
        problems, num_bytes, places = _check_shard(uri, info, item)
        return problems, num_bytes, split, places
    except UnavailableError:  # says nothing of the data
        raise
    except UserError as error:
        return [str(error)], 0, split, []


def _check_hash(name: str, data: bytes, sha256: str) -> list[str]:
    return [] if storage.sha256_hex(data) == sha256 else [f"{name}: other bytes than its manifest names"]


def _check_shard(uri: str, info: DatasetInfo, entry: ShardEntry) -> tuple[list[str], int, list]:
    tar_uri, rows_uri = storage.join(uri, entry.tar), storage.join(uri, entry.rows)
    tar, table = storage.read_bytes(tar_uri), storage.read_bytes(rows_uri)
    problems = _check_hash(tar_uri, tar, entry.sha256) + _check_hash(rows_uri, table, entry.rows_sha256)
    if problems:
        return problems, len(tar) + len(table), []
    rows = decode_rows(table, rows_uri)
    if entry.encoding != info.encoding:
        problems.append(f"{tar_uri}: encoding {entry.encoding}, the dataset is {info.encoding}")
    sizes = info.layout(entry.bucket).offsets(rows.tokens_RS).size_R
    if len(rows) != entry.num_samples or not np.array_equal(sizes, rows.size_R):
        problems.append(f"{rows_uri}: counts or sizes differ from what the layout gives")
    view = memoryview(tar)
    for key, start, size, expected in zip(rows.keys, rows.offset_R, rows.size_R, rows.checksum_R):
        if checksum(view[start : start + size]) != int(expected):
            problems.append(f"{tar_uri}: sample {key} has other bytes than its row says")
    return problems, len(tar) + len(table), [_read_origin(info) for info in _read_infos(tar)] or [None] * len(rows)


def _read_infos(tar: bytes) -> Iterator[dict]:
    import io
    import tarfile

    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for member in archive:
            if member.name.endswith(".json"):
                content = archive.extractfile(member)
                assert content is not None
                yield json.loads(content.read())


def _read_origin(info: dict) -> tuple[str, int] | None:
    place = info.get("from")
    return (place["shard"], place["row"]) if place else None
