"""Columns that were made after the dataset: a table with `key` and more columns, joined by key."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from data_pipeline.formats.parquet_io import decode_table
from data_pipeline.packing.shards import make_plain_key
from data_pipeline.stages.scratch_db import ScratchDatabase
from infra import storage
from infra.errors import UserError

KEY = "key"


class LateColumns:
    """One table: a parquet file, or all parquet files below a folder or prefix. Keys lie on scratch disk, values in
    memory."""

    def __init__(self, uri: str) -> None:
        """UserError where there is no such table, where it has no keys, or where a key occurs twice."""
        files = storage.list_files(uri, suffix=".parquet")
        if not files:
            raise UserError(f"--columns {uri}: no parquet file there")
        digest, tables = hashlib.sha256(), []
        for path in files:
            data = storage.read_bytes(path)
            digest.update(hashlib.sha256(data).digest())
            tables.append(decode_table(data, path))
            if tables[-1].schema.names != tables[0].schema.names:
                names, first_names = _list_names(tables[-1]), _list_names(tables[0])
                raise UserError(f"{path}: columns {names}, but {files[0]} has {first_names}")
        self.uri, self.fingerprint = uri, digest.hexdigest()[:16]
        if KEY not in tables[0].column_names:
            raise UserError(f"--columns {uri}: no column `{KEY}`, it has {_list_names(tables[0])}")
        try:
            table = pa.concat_tables(tables, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise UserError(f"--columns {uri}: files of different types: {str(error).splitlines()[0]}") from error
        self._rows = ScratchDatabase().new_map(KEY)
        self._index_keys(table[KEY])
        self.values = table.drop_columns([KEY]).combine_chunks()
        if not self.names:
            raise UserError(f"--columns {uri}: no column besides `{KEY}`")

    def _index_keys(self, keys: pa.ChunkedArray) -> None:
        row = 0
        for chunk in keys.chunks:
            for key in chunk.to_pylist():
                if key is None:
                    raise UserError(f"--columns {self.uri}: row {row} has no key")
                spelt = make_plain_key(str(key))  # as training shards spell it
                if (spelt,) in self._rows:
                    raise UserError(f"--columns {self.uri}: key {key!r} occurs twice: keep one row for each key")
                self._rows[spelt,] = row.to_bytes(8, "little")
                row += 1

    @property
    def names(self) -> list[str]:
        return self.values.column_names

    def join(self, keys: Sequence[str], names: Sequence[str]) -> tuple[pa.Table, int]:
        """(values of these keys, null where the table has none; how many it lacks)."""
        row_R = np.full(len(keys), -1, np.int64)
        for number, key in enumerate(keys):
            if (key,) in self._rows:
                row_R[number] = int.from_bytes(self._rows[key,], "little")
        missing_R = row_R < 0
        return self.values.select(list(names)).take(pa.array(row_R, mask=missing_R)), int(missing_R.sum())


def _list_names(table: pa.Table) -> str:
    return ", ".join(table.column_names) or "none"
