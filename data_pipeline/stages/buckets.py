"""Aspect buckets: image shapes of nearly equal area that a batch can be made of. Names are height x width in pixels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from data_pipeline.stages.stage import OK, ShardView, StageFunction, stage_table
from infra.errors import UserError

VERSION = 1


def list_buckets(resolution: int, *, step: int, max_aspect: float = 1.0) -> tuple[str, ...]:
    """Shapes with sides in multiples of `step`, area near resolution**2, aspect within bounds; each also turned."""
    if resolution % step:
        raise UserError(f"resolution {resolution} is no multiple of {step} (autoencoder factor times patch size)")
    # each height gets the width of nearly the same area, as in NovelAI's and SDXL's aspect buckets (SDXL, App. I)
    shapes = set()
    for height in range(step, resolution + 1, step):
        width = round(resolution**2 / height / step) * step
        if width / height <= max_aspect + 1e-9:
            shapes |= {(height, width), (width, height)}
    return tuple(f"{height}x{width}" for height, width in sorted(shapes))


def find_nearest_bucket(width: int, height: int, table: Sequence[str]) -> str:
    """The shape whose aspect is nearest on the logarithmic scale; the first of equals."""

    def distance(name: str) -> float:  # logarithms: 2:1 and 1:2 lie equally far from 1:1
        bucket_height, bucket_width = map(int, name.split("x"))
        return abs(math.log(width / height) - math.log(bucket_width / bucket_height))

    return min(table, key=distance)


@dataclass(frozen=True)
class BucketStage:
    """Which bucket a row goes to: decided from its size, before any crop."""

    table: tuple[str, ...]
    name: str = "bucket"
    inputs: tuple[str, ...] = ("measure",)

    def identity(self) -> dict[str, object]:
        return {"version": VERSION, "table": self.table}

    def open(self) -> StageFunction:
        def run(shard: ShardView) -> pa.Table:
            widths, heights = shard.values("measure", "width"), shard.values("measure", "height")
            names = [
                find_nearest_bucket(widths[row], heights[row], self.table) if widths[row] and heights[row] else ""  # type: ignore[arg-type]
                for row in shard.rows
            ]
            return stage_table(shard.rows, [OK] * len(names), bucket=pa.array(names, pa.string()))

        return run
