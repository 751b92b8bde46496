"""Who goes on: the loose gate before anything dear is computed, the strict thresholds when the data is packed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from data_pipeline.filters import Thresholds, judged_rows
from data_pipeline.stage import OK
from infra.errors import UserError

Statuses = dict[str, dict[int, tuple[str, str]]]  # shard -> row -> (status, reason)


@dataclass(frozen=True)
class Gate:
    """Looser limits for the rows that get captions and latents; None takes the strict limit of the same name."""

    min_side: int | None = None
    max_aspect: float | None = None
    max_caption_chars: int | None = None
    max_nsfw: float | None = None
    min_aesthetic: float | None = None
    min_caption_quality: float | None = None

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


def only_ok(tables: Mapping[str, pa.Table], judged: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
    """Rows that passed the filter."""
    kept = {}
    for shard, table in tables.items():
        good = {r for r, s in zip(*(judged[shard][name].to_pylist() for name in ("row", "status"))) if s == OK}
        kept[shard] = table.filter(pa.array([row in good for row in table["row"].to_pylist()], pa.bool_()))
    return kept


def merge_statuses(shards: Sequence[str], *stages: Mapping[str, pa.Table]) -> Statuses:
    """(status, reason) of every row: the first stage that objects has its say."""
    statuses: Statuses = {}
    for shard in shards:
        rows: dict[int, tuple[str, str]] = {}
        for table in (stage.get(shard) for stage in stages):
            if table is not None:
                columns = (table[name].to_pylist() for name in ("row", "status", "reason"))
                rows |= {row: (s, why) for row, s, why in zip(*columns) if row not in rows or rows[row][0] == OK}
        statuses[shard] = rows
    return statuses


def strict_statuses(
    strict: Thresholds, measured: Mapping[str, pa.Table], scores: Mapping[str, Mapping[str, pa.Table]]
) -> Statuses:
    """What the strict thresholds say of every row; `scores[name][shard]` are the score columns."""
    return {
        shard: {
            row["row"]: strict.judge(row)
            for row in judged_rows(table, {name: scores[name][shard] for name in strict.scorers})
        }
        for shard, table in measured.items()
    }
