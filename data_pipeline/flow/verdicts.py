"""The status and reason of every row, shard by shard, as Arrow tables: a row that is ok takes a dozen bytes."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.flow.columns import count_statuses
from data_pipeline.flow.stage import OK

Verdicts = dict[str, pa.Table]  # shard -> row, status, reason; rows ascending


def verdict_table(rows: Sequence[int], statuses: Sequence[str], reasons: Sequence[str]) -> pa.Table:
    return pa.table(
        {
            "row": pa.array(rows, pa.int32()),
            "status": pa.array(statuses, pa.string()).dictionary_encode(),
            "reason": pa.array(reasons, pa.string()),
        }
    )


def overruled(mine: pa.Table, said: pa.Table) -> pa.Table:
    """`mine`, where `said` objects to rows that were ok so far: the first stage that objects has its say."""
    objections = {row: (status, reason) for row, status, reason in _words(said) if status != OK}
    if not objections:
        return mine
    words = [
        (row, *(objections.get(row, (status, reason)) if status == OK else (status, reason)))
        for row, status, reason in _words(mine)
    ]
    return verdict_table(*zip(*words))


def ok_rows(table: pa.Table) -> np.ndarray:
    """Numbers of the rows that are ok, ascending."""
    return table.filter(_is_ok(table))["row"].to_numpy()


def rejected(table: pa.Table) -> pa.Table:
    """The other rows."""
    return table.filter(pc.invert(_is_ok(table)))


def totals(verdicts: Mapping[str, pa.Table]) -> Counter[str]:
    """Rows by status."""
    counts: Counter[str] = Counter()
    for table in verdicts.values():
        counts.update(count_statuses(table))
    return counts


def _is_ok(table: pa.Table) -> pa.ChunkedArray:
    return pc.equal(table["status"].cast(pa.string()), OK)


def _words(table: pa.Table) -> Iterator[tuple[int, str, str]]:
    yield from zip(*(table[name].to_pylist() for name in ("row", "status", "reason")))
