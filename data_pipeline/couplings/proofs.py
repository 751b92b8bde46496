"""Proofs: a small JSON file for each shard of couplings, which says that the shard is complete.

A worker writes a shard's objects first and its proof last, and only if there is no proof yet. So each shard counts
once, although two workers may have made it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.formats.index import ShardEntry
from data_pipeline.packing.pack import find_lost_shards, put_proof
from infra import storage
from infra.codec import from_json


@dataclass(frozen=True)
class SetAside:
    """A coupling that is in no shard, and why."""

    index: int
    reason: str


@dataclass(frozen=True)
class ShardProof:
    """What a shard holds. `entry` is its line of the index; None where every coupling of the shard was set aside."""

    entry: ShardEntry | None
    set_aside: tuple[SetAside, ...] = ()


def _name_folder(encoding: str) -> str:
    return f"proofs/{encoding}"


def read_shard_proofs(root: str, encoding: str) -> dict[str, ShardProof]:
    """The proofs below `root`, by id of the shard. `encoding`: the dataset's (`DatasetInfo.encoding`).

    A proof whose shard has lost its tar or its table of rows is left out: that shard is to be made again. UserError for
    a proof that cannot be read.
    """
    proofs: dict[str, ShardProof] = {}
    for uri in storage.list_files(storage.join(root, _name_folder(encoding)), suffix=".json"):
        proof = from_json(ShardProof, storage.read_bytes(uri), where=uri, advice="delete it and run the command again")
        proofs[uri.rsplit("/", 1)[-1].removesuffix(".json")] = proof
    lost = find_lost_shards(root, {name: proof.entry for name, proof in proofs.items() if proof.entry})
    return {name: proof for name, proof in proofs.items() if name not in lost}


def write_shard_proof(
    root: str, encoding: str, name: str, *, entry: ShardEntry | None, set_aside: Sequence[SetAside] = ()
) -> ShardProof:
    """Write the proof of the shard `name` and return the proof that counts from now on.

    Where another worker has proven the same shard already, its proof counts, unless objects that it names are gone.
    """
    proof = ShardProof(entry, tuple(set_aside))
    return put_proof(root, f"{_name_folder(encoding)}/{name}.json", proof, lambda standing: standing.entry)
