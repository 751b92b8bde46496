"""Images that were taken down: what the command left in a dataset root, read when the dataset is opened.

`selection/takedown.py` writes it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.loading.index import SplitIndex
from infra import storage
from infra.codec import from_json

FOLDER = "takedown"
EFFECTIVE = "takedowns.json"  # in a run folder: {name of a takedown: images seen when the run first left it out}


@dataclass(frozen=True)
class Takedown:
    """One object below takedown/, named by the hash of what was asked: the same request gives the same object."""

    keys: tuple[str, ...]
    """Keys of images, as training shards spell them."""
    hashes: tuple[str, ...]
    """Hashes of pixels (column signature), or SHA-256 of a file where the source gave it."""
    rows: tuple[tuple[str, int, str], ...]
    """(tar, row, key) of each sample in the shards of that day. A tar's name stands for its content."""
    name: str = ""
    """The object's name; not stored in it."""


def list_takedowns(uri: str) -> list[Takedown]:
    """All of a dataset root, by name."""
    found = []
    for path in storage.list_files(storage.join(uri, FOLDER), suffix=".json"):
        read = from_json(Takedown, storage.read_bytes(path), where=path, advice="give the takedown again")
        found.append(Takedown(read.keys, read.hashes, read.rows, path.rpartition("/")[2].removesuffix(".json")))
    return found


def find_taken_down(takedowns: Sequence[Takedown], index: SplitIndex) -> frozenset[tuple[int, int]]:
    """(shard, row) of the samples of a split that were taken down. Shards of an earlier pack are not in its index."""
    if not takedowns:
        return frozenset()
    numbers = {name: number for number, name in enumerate(index.tars)}
    return frozenset((numbers[tar], row) for found in takedowns for tar, row, _ in found.rows if tar in numbers)


def note_takedowns(uri: str, takedowns: Sequence[Takedown], *, images_seen: int) -> None:
    """Write down in a run folder which takedowns count from now on; those that counted before stay as they are."""
    since = read_noted(uri)
    storage.write_bytes(uri, json.dumps({one.name: images_seen for one in takedowns} | since, indent=1).encode())


def read_noted(uri: str) -> dict[str, int]:
    """What `note_takedowns` wrote; nothing where there is none."""
    return from_json(dict[str, int], storage.read_bytes(uri), where=uri) if storage.exists(uri) else {}
