"""A stage: a pure function from one shard's table to another, with a status for every row and no row dropped.

A stage is a small picklable description; `open()` builds what is heavy (models) once per worker. Stages know neither
ray nor where they run.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import pyarrow as pa
from PIL import Image

from data_pipeline.formats.schema import ColumnPart, fingerprint
from data_pipeline.images import decode
from data_pipeline.stages.columns import read_parts

OK = "ok"
MAX_DECODED = 512 * 2**20  # bytes of decoded images that a shard keeps for the stages after the first


@dataclass
class ShardView:
    """One canonical shard as a stage sees it: its columns so far, the rows to do, and its images (decoded once)."""

    root: str
    shard: str
    parts: Mapping[str, Sequence[ColumnPart]]
    rows: Sequence[int] = ()
    tables: dict[str, pa.Table] = field(default_factory=dict)
    _images: dict[int, Image.Image] = field(default_factory=dict)
    _image_bytes: int = 0

    def column(self, stage: str) -> pa.Table:
        """Another stage's table of this shard, ordered by row."""
        if stage not in self.tables:
            table = read_parts(self.root, self.parts[stage])
            if table is None:
                raise KeyError(f"shard {self.shard} has no column {stage}")
            self.tables[stage] = table
        return self.tables[stage]

    def values(self, stage: str, name: str) -> dict[int, object]:
        """One field of a column by row number."""
        table = self.column(stage)
        return dict(zip(table["row"].to_pylist(), table[name].to_pylist()))

    @cached_property
    def image_bytes(self) -> dict[int, bytes | None]:
        return self.values("ingest", "image")  # type: ignore[return-value]

    def image(self, row: int) -> Image.Image:
        """The RGB image of a row, upright. ImageError when it is none that we take."""
        if row in self._images:
            return self._images[row]
        image = decode(io.BytesIO(self.image_bytes[row] or b""))
        self._image_bytes += image.width * image.height * 3
        if self._image_bytes <= MAX_DECODED:  # beyond it the next stage decodes again: memory stays bounded
            self._images[row] = image
        return image

    def decodable(self) -> list[int]:
        """Rows to do whose images the measure column could decode."""
        statuses = self.values("measure", "status")
        return [row for row in self.rows if statuses[row] == OK]

    def image_batches(self, rows: Sequence[int], size: int) -> Iterator[tuple[Sequence[int], list[Image.Image]]]:
        """(rows, their images), so many at a time."""
        for first in range(0, len(rows), size):
            chosen = rows[first : first + size]
            yield chosen, [self.image(row) for row in chosen]


StageFunction = Callable[[ShardView], pa.Table]


class Stage(Protocol):
    """`inputs` are the columns it reads; `identity()` is all that its results depend on besides them."""

    @property
    def name(self) -> str: ...

    @property
    def inputs(self) -> tuple[str, ...]: ...

    def identity(self) -> Mapping[str, object]: ...

    def open(self) -> StageFunction: ...


def stage_fingerprint(stage: Stage, inputs: Mapping[str, str]) -> str:
    """What made the column: the stage's own identity and the fingerprints of what it read."""
    return fingerprint([stage.name, stage.identity(), {name: inputs[name] for name in stage.inputs}])


def stage_table(rows: Sequence[int], status: Sequence[str], **columns: pa.Array) -> pa.Table:
    """A stage's table: row number and status first."""
    return pa.table({"row": pa.array(rows, pa.int32()), "status": pa.array(status, pa.string()), **columns})
