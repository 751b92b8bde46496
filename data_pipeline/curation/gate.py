"""Which rows go on: a loose gate before anything expensive is computed, strict thresholds when data are packed."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from data_pipeline.curation.filters import Thresholds, join_scores
from data_pipeline.stages.row_status import ok_rows, status_table
from infra.errors import UserError


@dataclass(frozen=True)
class Gate:
    """Looser limits for the rows that get captions and latents; None takes the strict limit of the same name."""

    min_side: int | None = None
    max_aspect: float | None = None
    max_caption_chars: int | None = None
    max_nsfw: float | None = None
    min_aesthetic: float | None = None
    min_caption_quality: float | None = None
    min_caption_clip: float | None = None

    def thresholds(self, strict: Thresholds) -> Thresholds:
        """The gate's own thresholds; UserError where they would stop rows that the strict ones let through."""
        named = {name: value for name, value in vars(self).items() if value is not None}
        for name, value in named.items():
            limit = getattr(strict, name)
            tighter = limit is None or (value < limit if name.startswith("max") else value > limit)
            if tighter:
                asked = "no such limit" if limit is None else f"the strict limit {limit:g}"
                option = name.replace("_", "-")
                raise UserError(f"--gate.{option} {value:g} is tighter than {asked}: loosen it, or set --{option} too")
        return replace(strict, **named)


def select_ok(table: pa.Table, judged: pa.Table) -> pa.Table:
    """Rows of a shard's table that passed the filter."""
    return table.filter(pa.array(np.isin(table["row"].to_numpy(), ok_rows(judged))))


def judge_strictly(strict: Thresholds, measured: pa.Table, scores: Mapping[str, pa.Table]) -> pa.Table:
    """What the strict thresholds say of a shard's rows."""
    judged = [(row["row"], *strict.judge(row)) for row in join_scores(measured, scores)]
    return status_table(*zip(*judged))
