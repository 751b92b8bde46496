"""The proof of a shard that a worker made: written last and only if absent, so that each shard counts once."""

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
    """`entry` is None where every sample of the shard was set aside."""

    entry: ShardEntry | None
    set_aside: tuple[SetAside, ...] = ()


def _folder(encoding: str) -> str:
    return f"proofs/{encoding}"


def read_shard_proofs(root: str, encoding: str) -> dict[str, ShardProof]:
    """By id; without those of which an object is gone, as these are to be made again."""
    found: dict[str, ShardProof] = {}
    for uri in storage.list_files(storage.join(root, _folder(encoding)), suffix=".json"):
        proof = from_json(ShardProof, storage.read_bytes(uri), where=uri, advice="delete it and run the command again")
        found[uri.rsplit("/", 1)[-1].removesuffix(".json")] = proof
    lost = find_lost_shards(root, {name: proof.entry for name, proof in found.items() if proof.entry})
    return {name: proof for name, proof in found.items() if name not in lost}


def prove_shard(
    root: str, encoding: str, name: str, *, entry: ShardEntry | None, set_aside: Sequence[SetAside] = ()
) -> ShardProof:
    """The proof that stands: of two workers that made the same shard the first one's, unless what it proved is gone."""
    proof = ShardProof(entry, tuple(set_aside))
    return put_proof(root, f"{_folder(encoding)}/{name}.json", proof, lambda standing: standing.entry)
