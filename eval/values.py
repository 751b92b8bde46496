"""Values per prompt beside the rows, for paired comparisons: RESULTS/values/<protocol hash>/<recipe hash>-<images>.npz.

What all checkpoints of a protocol share (FID's reference) is kept once, as reference.npz. No pickles.
"""

import io
import zipfile

import numpy as np

from eval.metric import Kept
from infra import storage
from infra.errors import UserError

SHARED = "reference.npz"


def _uri(store_uri: str, protocol_hash: str, name: str) -> str:
    return storage.join(store_uri, "values", protocol_hash, name)


def _name(recipe_hash: str, images_seen: int) -> str:
    return f"{recipe_hash}-{images_seen}.npz"


def keep_values(store_uri: str, protocol_hash: str, recipe_hash: str, images_seen: int, kept: Kept) -> None:
    shared = {key: value for key, value in kept.items() if key.startswith("reference")}
    own = {key: value for key, value in kept.items() if key not in shared}
    if shared and not storage.exists(_uri(store_uri, protocol_hash, SHARED)):
        storage.write_bytes(_uri(store_uri, protocol_hash, SHARED), _pack(shared))
    if own:
        storage.write_bytes(_uri(store_uri, protocol_hash, _name(recipe_hash, images_seen)), _pack(own))


def read_values(store_uri: str, protocol_hash: str, recipe_hash: str, images_seen: int) -> Kept | None:
    """None where nothing was kept (rows of the trainer, or of an earlier version)."""
    uri = _uri(store_uri, protocol_hash, _name(recipe_hash, images_seen))
    if not storage.exists(uri):
        return None
    shared = _uri(store_uri, protocol_hash, SHARED)
    return (_unpack(shared) if storage.exists(shared) else {}) | _unpack(uri)


def _pack(arrays: Kept) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _unpack(uri: str) -> Kept:
    try:
        with np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{uri} is torn ({error}): delete it with its protocol's rows and evaluate again") from error
