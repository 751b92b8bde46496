"""What is known of each row of a split: its key and captions, what the pipeline measured, columns that came later."""

from collections.abc import Iterator, Sequence

import pyarrow as pa

from data_pipeline.curation.scores import is_score_column
from data_pipeline.formats.index import read_rows_table
from data_pipeline.formats.parquet_io import read_batches
from data_pipeline.loading.loader import Dataset
from data_pipeline.packing.pack import PlannedShard, read_planned_shards, read_proofs
from data_pipeline.selection.late_columns import KEY, LateColumns
from data_pipeline.stages.column_state import ColumnState
from data_pipeline.stages.columns import Column
from infra import storage
from infra.errors import UserError

_MEASURED = ("width", "height")


class RowValues:
    """Tables of the rows of a split's shards. `missing` counts the rows that each late table lacked."""

    def __init__(self, dataset: Dataset, late: Sequence[LateColumns] = ()) -> None:
        self.dataset, self.late = dataset, late
        self._own = [KEY, "bucket", *(f"caption_{name}" for name in dataset.info.captions)]
        columns = dataset.info.columns
        self._stage_of = {name: ("measure", name) for name in _MEASURED if "measure" in columns}
        self._stage_of |= {name: (name, "score") for name in columns if is_score_column(name)}
        if "signature" in columns:
            self._stage_of["exact"] = ("signature", "exact")
        if "measure" in columns:
            self._stage_of["info"] = ("measure", "info")
        self._late_of: dict[str, LateColumns] = {}
        for one in late:
            for name in one.names:
                if name in self._late_of:
                    raise UserError(f"--columns: both {self._late_of[name].uri} and {one.uri} have a column {name}")
                self._late_of[name] = one
        self.missing = {one.uri: 0 for one in late}
        self._states: dict[str, ColumnState] = {}  # by stage

    @property
    def names(self) -> set[str]:
        """Columns that a condition may name. A late column hides one of the dataset's own of that name."""
        return {*self._own, *self._stage_of, *self._late_of}

    def read(self, names: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        """(shard, its rows with these columns), each shard once, in no order."""
        names = [name for name in names if name != KEY]
        staged = [name for name in names if name in self._stage_of and name not in self._late_of]
        late = [one for one in self.late if any(name in names for name in one.names)]
        shards = ((number, None) for number in range(len(self.dataset.index.tars)))
        for shard, origin in self._find_origins() if staged else shards:
            table = read_rows_table(self.dataset.index.rows_uri(shard))
            keys = table[KEY].to_pylist()
            columns = {KEY: table[KEY], "bucket": pa.array([self.dataset.index.buckets[shard]] * len(table))}
            columns |= {name: table[name] for name in self._own[2:] if name in names}
            if origin is not None:
                columns |= self._read_stages(origin, staged)
            for one in late:
                joined, missing = one.join(keys, [name for name in one.names if name in names])
                self.missing[one.uri] += missing
                columns |= {name: joined[name] for name in joined.column_names}
            yield shard, pa.table({name: columns[name] for name in (KEY, *names)})

    def _find_origins(self) -> Iterator[tuple[int, PlannedShard]]:
        """The rows of canonical shards that each training shard was packed from, out of the pack plans."""
        root, index = self.dataset.uri, self.dataset.index
        numbers = {tar: number for number, tar in enumerate(index.tars)}
        proofs = read_proofs(root, self.dataset.info.encoding)
        wanted = {output: numbers[entry.tar] for output, entry in proofs.items() if entry.tar in numbers}
        for uri in storage.list_files(storage.join(root, "pack"), suffix=".parquet", recursive=False):
            if wanted:
                for output in read_planned_shards(read_batches(uri), frozenset(wanted)):
                    if output.id in wanted:
                        numbers.pop(index.tars[wanted[output.id]], None)
                        yield wanted.pop(output.id), output
        if numbers:
            raise UserError(
                f"{root}: pack/ does not say which rows {next(iter(numbers))} was packed from: run the pipeline there "
                "again, or give what you need as --columns"
            )

    def _read_stages(self, output: PlannedShard, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
        found: dict[str, list[pa.Array]] = {name: [] for name in names}
        for shard, row_R in output.rows:
            for name in names:
                stage, field = self._stage_of[name]
                table = self._state(stage).read(stage, shard, ["row", field])
                at = {row: number for number, row in enumerate(table["row"].to_pylist())}
                places = pa.array([at.get(row) for row in row_R.tolist()], pa.int64())
                found[name].append(table[field].combine_chunks().take(places))
        return {name: pa.chunked_array(parts) for name, parts in found.items()}

    def _state(self, stage: str) -> ColumnState:
        if stage not in self._states:
            root = self.dataset.uri
            state = self._states[stage] = ColumnState(root)
            for manifest in state.manifests(Column(root, stage, self.dataset.info.columns[stage]), heal=False):
                state.record(manifest)
        return self._states[stage]
