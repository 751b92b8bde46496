"""Values per prompt beside the rows, for paired comparisons: RESULTS/values/<protocol hash>/<recipe hash>-<images>.npz.

One row per prompt or sample ("cluster") of each metric ("stratum"): the sum of its values and their count. What all
checkpoints of a protocol share (FID's reference) is kept once, as reference.npz. No pickles.
"""

import io
import zipfile
from collections.abc import Mapping

import numpy as np

from infra import storage
from infra.errors import UserError

SHARED = "reference.npz"

# Arrays by name. Names that begin with "reference" are the same for every checkpoint of a protocol.
PromptValues = dict[str, np.ndarray]


def tabulate_samples(values: Mapping[str, np.ndarray]) -> PromptValues:
    """Metrics with one value for each of the same samples, which are numbered in their order."""
    counts = [len(column) for column in values.values()]
    return {
        "stratum": np.repeat(np.array(list(values), dtype=str), counts),
        "cluster": np.concatenate([np.arange(count, dtype=float) for count in counts]),
        "sum": np.concatenate([np.asarray(column, dtype=float) for column in values.values()]),
        "count": np.ones(sum(counts)),
    }


def _locate(store_uri: str, protocol_hash: str, name: str) -> str:
    return storage.join(store_uri, "values", protocol_hash, name)


def _name_file(recipe_hash: str, images_seen: int) -> str:
    return f"{recipe_hash}-{images_seen}.npz"


def keep_values(store_uri: str, protocol_hash: str, recipe_hash: str, images_seen: int, kept: PromptValues) -> None:
    """Store one checkpoint's values, and once per protocol what its checkpoints share."""
    shared = {key: value for key, value in kept.items() if key.startswith("reference")}
    own = {key: value for key, value in kept.items() if key not in shared}
    if shared and not storage.exists(_locate(store_uri, protocol_hash, SHARED)):
        storage.write_bytes(_locate(store_uri, protocol_hash, SHARED), _pack(shared))
    if own:
        storage.write_bytes(_locate(store_uri, protocol_hash, _name_file(recipe_hash, images_seen)), _pack(own))


def read_values(store_uri: str, protocol_hash: str, recipe_hash: str, images_seen: int) -> PromptValues | None:
    """The stored values of one checkpoint; None if none were stored."""
    uri = _locate(store_uri, protocol_hash, _name_file(recipe_hash, images_seen))
    if not storage.exists(uri):
        return None
    shared = _locate(store_uri, protocol_hash, SHARED)
    return (_unpack(shared) if storage.exists(shared) else {}) | _unpack(uri)


def _pack(arrays: PromptValues) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _unpack(uri: str) -> PromptValues:
    try:
        with np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{uri} is torn ({error}): delete it with its protocol's rows and evaluate again") from error
