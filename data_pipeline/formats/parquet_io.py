"""Parquet in and out: equal tables give equal bytes, large ones pass through scratch disk, reading stays in its thread.

Arrow's pools may not have wound up when the interpreter ends: it then aborts after all work is done, or hangs
(apache/arrow issues 34314 and 50482). So nothing here reads with threads.
"""

import hashlib
import io
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage
from infra.errors import UserError
from infra.scratch import refuse_full_disk

_GROUP_BYTES = 16 * 2**20
_HELD = 256  # tables
_BATCH_ROWS = 1024


def encode_table(table: pa.Table) -> bytes:
    """A parquet file as bytes; equal tables give equal bytes."""
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue()


def write_tables(root: str, stem: str, tables: Iterable[pa.Table]) -> str:
    """Tables (one at least) as one parquet file under `stem` and its hash, through scratch disk; returns that name.

    Up to a row group of `_GROUP_BYTES` is in memory. What fits into one gives the bytes of `encode_table`.
    """
    with refuse_full_disk(), tempfile.NamedTemporaryFile() as file:
        writer, waiting, size = None, [], 0
        for table in chain(tables, [None]):
            if table is not None:
                waiting.append(table)
                size += table.nbytes
                if len(waiting) == _HELD:  # small ones, or without rows: each takes kilobytes beside its values
                    waiting = [pa.concat_tables(waiting).combine_chunks()]
            if waiting and (table is None or size >= _GROUP_BYTES):
                writer = writer or pq.ParquetWriter(file, waiting[0].schema, compression="zstd")
                writer.write_table(pa.concat_tables(waiting).combine_chunks())
                waiting, size = [], 0
        assert writer is not None, stem
        writer.close()
        file.seek(0)
        name = f"{stem}{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}.parquet"  # type: ignore[arg-type]
        storage.upload(file.name, storage.join(root, name))
    return name


def read_batches(uri: str) -> Iterator[pa.RecordBatch]:
    """The rows of a large parquet file, some thousand at a time."""
    with storage.open_read(uri) as stream:
        try:
            yield from pq.ParquetFile(stream).iter_batches(_BATCH_ROWS, use_threads=False)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{uri}: not a readable parquet file ({str(error).splitlines()[0]})") from error


def decode_table(data: bytes, uri: str) -> pa.Table:
    """A parquet file's rows; `uri` is for messages."""
    try:
        return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{uri}: not a readable parquet file ({str(error).splitlines()[0]})") from error
