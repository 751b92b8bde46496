"""Filters: the rows of a dataset that fulfil conditions. Found once, kept in the dataset root, never packed again.

`selections/NAME.parquet` has a bit per row; NAME is a hash of the dataset's fingerprint, the conditions and the content
of the tables that came later, so the object never changes.
"""

import json
from collections.abc import Sequence

import numpy as np

from data_pipeline.formats.schema import fingerprint
from data_pipeline.loading.kept import KeptRows, read_kept_rows
from data_pipeline.loading.loader import Dataset
from data_pipeline.selection.expressions import RowCondition
from data_pipeline.selection.late_columns import LateColumns
from data_pipeline.selection.row_values import RowValues
from infra import storage
from infra.errors import UserError
from infra.log import get_logger

log = get_logger("select")
FOLDER = "selections"


def select_rows(dataset: Dataset, where: Sequence[str], columns: Sequence[str] = ()) -> Dataset:
    """The dataset, of which only rows that fulfil all conditions are trained on. Nothing to do without a condition."""
    if not where:
        if columns:
            raise UserError(f"--columns {columns[0]}: a table that no --where reads: give a condition, or leave it out")
        return dataset
    conditions, late = [RowCondition(text) for text in where], [LateColumns(uri) for uri in columns]
    selection = {
        "dataset": dataset.info.fingerprint, "split": dataset.split,
        "where": [condition.text for condition in conditions], "columns": [one.fingerprint for one in late],
    }  # fmt: skip
    name = fingerprint(selection)
    uri = storage.join(dataset.uri, FOLDER, f"{name}.parquet")
    if storage.exists(uri):
        kept, _ = read_kept_rows(uri, dataset.index)
        return dataset.keep(kept, name)
    kept = _find_rows(dataset, conditions, late)
    _publish(uri, kept.to_bytes(dataset.index, {"asked": json.dumps(selection)}))
    return dataset.keep(kept, name)


def _find_rows(dataset: Dataset, conditions: Sequence[RowCondition], late: Sequence[LateColumns]) -> KeptRows:
    values = RowValues(dataset, late)
    for condition in conditions:
        condition.check_columns(values.names, dataset.uri)
    wanted = sorted(set[str]().union(*(condition.names for condition in conditions)))
    idle = [one.uri for one in late if not set(one.names) & set(wanted)]
    if idle:
        raise UserError(f"--columns {idle[0]}: no --where reads a column of it: leave it out, or name one")
    masks: dict[int, np.ndarray] = {}
    for shard, table in values.read(wanted):
        masks[shard] = np.logical_and.reduce([condition.mask(table) for condition in conditions])
    kept, total = KeptRows(masks[shard] for shard in range(len(dataset.index.tars))), dataset.index.num_samples
    for uri, missing in values.missing.items():
        if missing:
            log.warning("%s has no row for %s of %s samples: their columns are null", uri, f"{missing:,}", f"{total:,}")
    written = " and ".join(repr(condition.given) for condition in conditions)
    if not kept.num_kept:
        raise UserError(f"--where {written} keeps none of the {total:,} samples in {dataset.uri}: loosen it")
    log.info("%s keeps %s of %s samples (%.1f %%) of %s", written, f"{kept.num_kept:,}", f"{total:,}",
             100 * kept.num_kept / total, dataset.uri)  # fmt: skip
    return kept


def _publish(uri: str, data: bytes) -> None:
    """A root that may only be read is filtered anew each time."""
    try:
        storage.write_bytes_if_absent(uri, data)
    except (UserError, OSError) as error:
        log.warning("the selected rows are not kept for the next run: %s", error)
