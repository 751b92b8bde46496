"""One rank's part of a checkpoint as bytes: a safetensors file streamed from memory, and range reads of it.

Locally a file is written beside its final name, synced and renamed; on S3 it is one put, of a file below BEELINE_CACHE.
Memory stays at one tensor.
"""

import hashlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infra import storage
from infra.errors import UserError
from trainer.runfolder import name_rank
from trainer.zero.partition import Segment

CHUNK = 64 * 2**20


@dataclass(frozen=True)
class RangeCopy:
    """`numel` elements from position `source` of rank file `rank` to position `target` of flat tensor `flat`."""

    rank: int
    source: int
    flat: int
    target: int
    numel: int


def write_rank_file(
    folder: str,
    rank: int,
    segments: Sequence[Sequence[Segment]],
    tensors: dict[str, list[Tensor]],
    extra: dict[str, Any],
) -> tuple[int, ...]:
    """Write both files of a rank (`extra` is kept in the JSON); their sha256 as sixteen 32-bit words."""
    numel = sum(s.numel for flat in segments for s in flat)
    header = {
        name: {"dtype": "F32", "shape": [numel], "data_offsets": [index * numel * 4, (index + 1) * numel * 4]}
        for index, name in enumerate(tensors)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # safetensors wants the data aligned to 8 bytes
    rows = [[s.name, list(s.shape), s.start, s.numel] for flat in segments for s in flat]
    index = {"segments": rows, "extra": extra}

    def data() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little")
        yield text
        for flats in tensors.values():
            for flat, parts in zip(flats, segments, strict=True):
                host = flat.detach().to("cpu", torch.float32).contiguous().numpy()
                for start, stop in _join_segments(parts):
                    yield host[start:stop].data.cast("B")

    written = put_hashed(storage.join(folder, f"{name_rank(rank)}.safetensors"), data())
    described = put_hashed(storage.join(folder, f"{name_rank(rank)}.json"), iter([json.dumps(index).encode()]))
    return tuple(int.from_bytes(digest[i : i + 4], "big") for digest in (written, described) for i in range(0, 32, 4))


def read_whole_files(folder: str, rank: int, hashes: Mapping[str, str]) -> str:
    """The JSON text beside a rank file: its ranges, in file order, and what else that rank had to keep. UserError where
    one of the rank's files does not have its hash."""
    described = f"{name_rank(rank)}.json"
    text = storage.read_bytes(storage.join(folder, described))
    for name, wanted in hashes.items():
        content = hashlib.sha256(text).hexdigest() if name == described else hash_file(storage.join(folder, name))
        if content != wanted:
            raise UserError(f"{name} does not have the content that was saved")
    return text.decode()


def hash_file(uri: str) -> str:
    """sha256 of a file, read in pieces."""
    digest, left, at = hashlib.sha256(), storage.get_size(uri), 0
    while left > 0:
        piece = storage.read_bytes(uri, at, min(CHUNK, left))
        if not piece:
            break
        digest.update(piece)
        at, left = at + len(piece), left - len(piece)
    return digest.hexdigest()


class Ranges:
    """Which range of which parameter lies where in the rank files of a checkpoint. `indexes`: the JSON of each rank, in
    rank order."""

    def __init__(self, folder: str, indexes: Sequence[Mapping[str, Any]]) -> None:
        self.folder = folder
        self.sources: dict[str, list[tuple[int, int, int, int]]] = defaultdict(list)  # (start, numel, rank, at)
        self.shapes: dict[str, tuple[int, ...]] = {}
        for rank, index in enumerate(indexes):
            at = 0
            for name, shape, start, numel in index["segments"]:
                self.sources[name].append((start, numel, rank, at))
                self.shapes[name] = tuple(shape)
                at += numel


def copy_ranges(ranges: Ranges, segments: Sequence[Sequence[Segment]], tensors: dict[str, list[Tensor]]) -> None:
    """Fill `tensors` in place from the rank files that hold the ranges, reading those ranges only."""
    folder = ranges.folder
    copies = _choose_copies(ranges, segments)
    headers = {rank: _read_header(folder, rank) for rank in sorted({copy.rank for copy in copies})}

    def fill(job: tuple[str, RangeCopy]) -> None:
        name, copy = job
        begin, entries = headers[copy.rank]
        if name not in entries:
            raise UserError(f"{folder}: holds no {name!r}; it was saved by a run with other settings")
        at = begin + entries[name]["data_offsets"][0] + copy.source * 4
        uri = storage.join(folder, f"{name_rank(copy.rank)}.safetensors")
        data = storage.read_bytes(uri, at, copy.numel * 4)
        if len(data) != copy.numel * 4:
            raise UserError(f"{uri}: ends early; the checkpoint is damaged")
        values = torch.from_numpy(np.frombuffer(data, np.float32).copy())
        tensors[name][copy.flat][copy.target : copy.target + copy.numel] = values.to(tensors[name][copy.flat].device)

    jobs = [(name, copy) for name in tensors for copy in copies]
    with ThreadPoolExecutor(16 if storage.is_remote(folder) else 1) as pool:
        list(pool.map(fill, jobs))


def _choose_copies(ranges: Ranges, segments: Sequence[Sequence[Segment]]) -> list[RangeCopy]:
    """Which ranges to fetch, neighbours joined: with the same number of ranks that is one read per tensor."""
    folder, sources, shapes = ranges.folder, ranges.sources, ranges.shapes
    found: list[RangeCopy] = []
    for flat, parts in enumerate(segments):
        for s in parts:
            if shapes.get(s.name) != s.shape:
                raise UserError(
                    f"{folder}: parameter {s.name} has shape {shapes.get(s.name, 'none')}, the recipe's model wants "
                    f"{s.shape}: it is a checkpoint of another architecture"
                )
            covered = 0
            for start, numel, rank, at in sources[s.name]:
                first, last = max(start, s.start), min(start + numel, s.start + s.numel)
                if first < last:
                    found.append(RangeCopy(rank, at + first - start, flat, s.offset + first - s.start, last - first))
                    covered += last - first
            if covered != s.numel:
                raise UserError(f"{folder}: {covered} of {s.numel} elements of {s.name} are there; it is damaged")
    return _join_neighbours(found)


def _join_neighbours(copies: list[RangeCopy]) -> list[RangeCopy]:
    joined: list[RangeCopy] = []
    for copy in sorted(copies, key=lambda c: (c.flat, c.rank, c.target)):
        last = joined[-1] if joined else None
        if (
            last is not None
            and (last.rank, last.flat) == (copy.rank, copy.flat)
            and last.source + last.numel == copy.source
            and last.target + last.numel == copy.target
        ):
            joined[-1] = RangeCopy(last.rank, last.source, last.flat, last.target, last.numel + copy.numel)
        else:
            joined.append(copy)
    return joined


def _read_header(folder: str, rank: int) -> tuple[int, dict[str, dict[str, list[int]]]]:
    """(position of the data, entries) of a safetensors file."""
    uri = storage.join(folder, f"{name_rank(rank)}.safetensors")
    length = int.from_bytes(storage.read_bytes(uri, 0, 8), "little")
    return 8 + length, json.loads(storage.read_bytes(uri, 8, length))


def _join_segments(parts: Sequence[Segment]) -> Iterator[tuple[int, int]]:
    """Neighbouring segments of a flat tensor as (start, stop): padding lies between."""
    start = stop = None
    for s in parts:
        if stop == s.offset:
            stop += s.numel
        else:
            if start is not None and stop is not None:
                yield start, stop
            start, stop = s.offset, s.offset + s.numel
    if start is not None and stop is not None:
        yield start, stop


def put_hashed(uri: str, pieces: Iterable[bytes | memoryview]) -> bytes:
    """Write a whole object atomically and give its sha256."""
    if storage.is_remote(uri):  # by way of a disk: an object of unknown size would have to be collected in memory
        storage.cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=storage.cache_folder(), suffix=storage.TEMP_SUFFIX) as folder:
            staged = Path(folder) / "object"
            written = put_hashed(str(staged), pieces)
            storage.upload(staged, uri)
        return written
    digest = hashlib.sha256()
    with storage.open_new_file(storage.local_path(uri)) as file:
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
    return digest.digest()
