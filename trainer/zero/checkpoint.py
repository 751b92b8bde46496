"""Checkpoints in our own format: safetensors and JSON, one file per rank, loaded by any number of ranks.

RUN/checkpoints/step_0000100/rank_00000.safetensors holds flat fp32 ranges (the masters, both Adam moments, every EMA
profile), rank_00000.json says which range of which parameter lies where, manifest.json names all files with their
hashes and is written last: a folder without it is no checkpoint. `latest` follows the manifest.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from infra import storage
from infra.errors import UnavailableError, UserError
from infra.log import get_logger
from trainer.recipe import Recipe, find_differences
from trainer.runfolder import name_rank, name_step
from trainer.zero.group import Group
from trainer.zero.partition import Segment
from trainer.zero.rankfile import Ranges, copy_ranges, read_whole_files, write_rank_file

log = get_logger("checkpoint")
FORMAT = 1
MANIFEST, LATEST = "manifest.json", "latest"
# An explicit --resume PATH may change these: one run at constant rate serves several horizons.
MAY_CHANGE = ("images", "schedule.", "optimizer.")


@dataclass
class RankShare:
    """What one rank saves or loads: for each tensor name one flat tensor per group of segments."""

    segments: list[tuple[Segment, ...]]
    tensors: dict[str, list[Tensor]]
    extra: dict[str, Any] = field(default_factory=dict)
    """Kept in the rank's JSON: what only this rank knows."""


@dataclass(frozen=True)
class StoredCheckpoint:
    """A complete checkpoint: where it is, what its manifest says, and the JSON of each rank that wrote it."""

    uri: str
    manifest: dict[str, Any]
    indexes: tuple[dict[str, Any], ...]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def state(self) -> dict[str, Any]:
        return self.manifest["state"]

    @property
    def extras(self) -> list[dict[str, Any]]:
        """What each rank kept for itself, in rank order."""
        return [index["extra"] for index in self.indexes]


def save(root: str, share: RankShare, group: Group, *, step: int, state: dict[str, Any], keep: int) -> bool:
    """Publish one checkpoint under `root` or none; False when some rank could not write. Collective.

    No rank waits for a failed one: success is summed over the ranks before anything is published.
    """
    manifest = write(root, share, group, step=step, state=state)
    if manifest is None:
        return False
    problem = ""
    if group.rank == 0:
        try:
            publish(root, manifest, keep=keep)
        except (UserError, OSError) as error:
            problem = str(error)
            log.warning("checkpoint step %d: %s", step, problem)
    return not group.any(bool(problem))


def write(root: str, share: RankShare, group: Group, *, step: int, state: dict[str, Any]) -> dict[str, Any] | None:
    """Every rank's files under `root`, and the manifest to publish them with; None when a rank failed. Collective."""
    folder = storage.join(root, name_step(step))
    problem = ""
    entry: tuple[int, ...] = ()
    try:
        if group.rank == 0:
            withdraw(root, step)
        entry = write_rank_file(folder, group.rank, share.segments, share.tensors, share.extra)
    except (UserError, OSError) as error:
        problem = str(error)
        log.warning("checkpoint step %d: %s", step, problem)
    entries = _gather(entry, group)
    if group.any(bool(problem)):
        if group.rank == 0:
            _remove(folder)
        return None
    return {"format": FORMAT, "step": step, "world_size": group.world_size, "state": state, "files": entries}


def withdraw(root: str, step: int) -> None:
    """A damaged checkpoint of the same step must not vouch for new files."""
    storage.delete(storage.join(root, name_step(step), MANIFEST))


def publish(root: str, manifest: dict[str, Any], *, keep: int) -> None:
    """Write the manifest and `latest`, which make the files of all ranks a checkpoint; then remove old checkpoints, but
    the newest `keep`. Rank 0 calls it, when the files of all ranks are there."""
    step = int(manifest["step"])
    name = name_step(step)
    storage.write_bytes(storage.join(root, name, MANIFEST), json.dumps(manifest, indent=1).encode())
    storage.write_bytes(storage.join(root, LATEST), f"{name}\n".encode())
    _retain(root, keep, step)


def list_checkpoints(root: str) -> list[str]:
    """Folders of published checkpoints, newest first."""
    suffix = f"/{MANIFEST}"
    if not storage.exists(root):
        return []
    found = [uri.removesuffix(suffix) for uri in storage.list_files(root, suffix=suffix)]
    return sorted((uri for uri in found if re.search(r"/step_\d+$", uri)), reverse=True)


def find_newest(root: str, group: Group) -> StoredCheckpoint | None:
    """The newest checkpoint that is whole, saying so when newer ones are damaged; None when there never was one."""
    folders = list_checkpoints(root)
    if group.rank == 0:
        _warn_half_copied(root, folders)
    for index, folder in enumerate(folders):
        found, reason = inspect(folder, group)
        if found is not None:
            return found
        if group.rank == 0:
            then = "falling back to the one before" if index + 1 < len(folders) else "and there is no older one"
            log.warning("checkpoint %s is damaged (%s), %s", folder, reason, then)
    if folders:
        raise UserError(f"{root}: all {len(folders)} checkpoints are damaged; start over in another folder with --out")
    return None


def _warn_half_copied(root: str, folders: list[str]) -> None:
    """`latest` follows the manifest of what it names: where that is missing, a copy was cut off or taken away."""
    uri = storage.join(root, LATEST)
    if folders and storage.exists(uri):
        named = storage.join(root, storage.read_bytes(uri).decode(errors="replace").strip())
        if named.rsplit("/", 1)[-1] not in {folder.rsplit("/", 1)[-1] for folder in folders}:
            then = "falling back to the one before"
            log.warning("checkpoint %s is damaged (no %s: half copied), %s", named, MANIFEST, then)


def require_whole(folder: str, group: Group) -> StoredCheckpoint:
    """The checkpoint in this very folder; UserError when it is not whole. Collective."""
    found, reason = inspect(folder, group)
    if found is None:
        raise UserError(f"--resume {folder}: not a whole checkpoint ({reason})")
    return found


def inspect(folder: str, group: Group) -> tuple[StoredCheckpoint | None, str]:
    """(checkpoint, "") when its manifest reads and every file has the hash it names, else (None, why). Collective.
    UnavailableError where the storage does not answer: that says nothing of the checkpoint.

    Each file is read by one rank, and the ranks hand on the JSON files that they read: on as many ranks as wrote it, a
    rank reads three objects.
    """
    reason, outage, manifest, texts = "", "", {}, {}
    try:
        manifest = json.loads(storage.read_bytes(storage.join(folder, MANIFEST)))
        if manifest["format"] != FORMAT:
            raise UserError(f"format {manifest['format']}, this version reads {FORMAT}")
        for number in range(group.rank, len(manifest["files"]), group.world_size):
            texts[number] = read_whole_files(folder, number, manifest["files"][number])
    except UnavailableError as error:
        outage = str(error)
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
    if group.any(bool(outage)):
        raise UnavailableError(outage or f"{folder}: another rank got no answer from the storage")
    if group.any(bool(reason)):
        return None, reason or "another rank could not read its part"
    for part in group.gather(json.dumps(texts)):
        texts |= {int(number): text for number, text in json.loads(part).items()}
    return StoredCheckpoint(folder, manifest, tuple(json.loads(texts[number]) for number in sorted(texts))), ""


def check_same_recipe(
    uri: str, kept: dict[str, Any], recipe: Recipe, *, resume: str, unknown: tuple[str, ...] = ()
) -> None:
    """Refuse a checkpoint of another recipe, by its manifest's state; what --resume PATH may change is left aside, and
    so are `unknown` fields of the recipe."""
    changed = find_differences(Recipe.from_json(kept["recipe"]), recipe)
    changed = [line for line in changed if not line.startswith(unknown)]
    if resume != "latest":
        changed = [line for line in changed if not line.startswith(MAY_CHANGE)]
    if any(line.startswith("model.") for line in changed):
        raise UserError(f"{uri} is of another architecture ({'; '.join(changed)}): use the options it was saved with")
    if changed:
        raise UserError(f"{uri} belongs to another recipe ({'; '.join(changed)}): use the options it was saved with")


def load(found: StoredCheckpoint, share: RankShare, group: Group) -> None:
    """Fill the tensors of `share` in place, whatever number of ranks wrote them. Collective only in its verdict."""
    problem, outage = "", ""
    try:
        copy_ranges(Ranges(found.uri, found.indexes), share.segments, share.tensors)
    except UnavailableError as error:
        outage = str(error)
    except (UserError, OSError) as error:
        problem = str(error)
    if group.any(bool(outage)):
        raise UnavailableError(outage or f"{found.uri}: another rank got no answer from the storage")
    if group.any(bool(problem)):
        raise UserError(problem or f"{found.uri}: another rank could not load its part")


def _gather(entry: tuple[int, ...], group: Group) -> list[dict[str, str]]:
    """Every rank's two file hashes (as 16 words of 32 bits, exact in float64), in rank order, on all ranks."""
    words = torch.zeros(group.world_size, 16, dtype=torch.float64, device=group.device)
    if len(entry) == 16:
        words[group.rank] = torch.tensor(entry, dtype=torch.float64)
    rows = group.sum_(words).long().tolist()
    return [
        {
            f"{name_rank(rank)}.safetensors": "".join(f"{word:08x}" for word in row[:8]),
            f"{name_rank(rank)}.json": "".join(f"{word:08x}" for word in row[8:]),
        }
        for rank, row in enumerate(rows)
    ]


def _retain(root: str, keep: int, step: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what killed saves left behind."""
    good = {uri.rsplit("/", 1)[-1] for uri in list_checkpoints(root)[:keep]}
    for name in sorted(set(_list_step_folders(root)) - good):
        if int(name.removeprefix("step_")) != step:
            _remove(storage.join(root, name))


def _list_step_folders(root: str) -> Iterator[str]:
    if not storage.is_remote(root):
        for path in storage.local_path(root).iterdir():
            if re.fullmatch(r"step_\d+", path.name):
                yield path.name
        return
    for uri in storage.list_files(root):
        found = re.search(r"/(step_\d+)/[^/]+$", uri)
        if found:
            yield found[1]


def _remove(folder: str) -> None:
    """The manifest first: a half-removed checkpoint must not look whole. What cannot be removed now stays for the
    next save to remove."""
    try:
        storage.delete(storage.join(folder, MANIFEST))
        for uri in storage.list_files(folder):
            storage.delete(uri)
    except (UserError, OSError) as error:
        log.warning("%s: not removed: %s", folder, error)
        return
    if not storage.is_remote(folder):
        shutil.rmtree(storage.local_path(folder), ignore_errors=True)  # with what a killed save left unfinished
