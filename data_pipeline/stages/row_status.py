"""The status and reason of every row, shard by shard, as Arrow tables that lie on scratch disk."""

import io
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.stages.columns import count_statuses
from data_pipeline.stages.scratch_db import ScratchDatabase
from data_pipeline.stages.stage import OK

# Arrow's own threads may outlive the interpreter, see parquet_io.py.
_WRITE = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
_READ = pa.ipc.IpcReadOptions(use_threads=False)


class RowStatuses(MutableMapping[str, pa.Table]):
    """A map from shard, in order, to a table of row (ascending), status and reason. Tables are read on demand."""

    def __init__(self, database: ScratchDatabase) -> None:
        self._map = database.new_map("shard")

    def __getitem__(self, shard: str) -> pa.Table:
        with pa.ipc.open_stream(self._map[shard,], options=_READ) as stream:
            return stream.read_all()

    def __setitem__(self, shard: str, table: pa.Table) -> None:
        out = io.BytesIO()
        with pa.ipc.new_stream(out, table.schema, options=_WRITE) as stream:
            stream.write_table(table)
        self._map[shard,] = out.getvalue()

    def __delitem__(self, shard: str) -> None:
        del self._map[shard,]

    def __contains__(self, shard: object) -> bool:
        return (str(shard),) in self._map

    def __iter__(self) -> Iterator[str]:
        return (str(shard) for (shard,) in self._map)

    def __len__(self) -> int:
        return len(self._map)


def status_table(rows: Sequence[int], statuses: Sequence[str], reasons: Sequence[str]) -> pa.Table:
    return pa.table(
        {
            "row": pa.array(rows, pa.int32()),
            "status": pa.array(statuses, pa.string()).dictionary_encode(),
            "reason": pa.array(reasons, pa.string()),
        }
    )


def override_statuses(statuses: pa.Table, newer: pa.Table) -> pa.Table:
    """`statuses`, changed where `newer` objects to rows that were ok so far: the first stage that objects decides."""
    objections = {row: (status, reason) for row, status, reason in _iterate_rows(newer) if status != OK}
    if not objections:
        return statuses
    words = [
        (row, *(objections.get(row, (status, reason)) if status == OK else (status, reason)))
        for row, status, reason in _iterate_rows(statuses)
    ]
    return status_table(*zip(*words))


def ok_rows(table: pa.Table) -> np.ndarray:
    """Numbers of the rows that are ok, ascending."""
    return table.filter(_mask_ok(table))["row"].to_numpy()


def select_rejected(table: pa.Table) -> pa.Table:
    """The other rows."""
    return table.filter(pc.invert(_mask_ok(table)))


def count_by_status(verdicts: Mapping[str, pa.Table]) -> Counter[str]:
    """Rows by status."""
    counts: Counter[str] = Counter()
    for table in verdicts.values():
        counts.update(count_statuses(table))
    return counts


def _mask_ok(table: pa.Table) -> pa.ChunkedArray:
    return pc.equal(table["status"].cast(pa.string()), OK)


def _iterate_rows(table: pa.Table) -> Iterator[tuple[int, str, str]]:
    yield from zip(*(table[name].to_pylist() for name in ("row", "status", "reason")))
