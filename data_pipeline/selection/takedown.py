"""Taking images down: out of every later batch at once, out of the shards at the next pack; and which runs saw them.

At once: an object below takedown/ lists the samples, and the order of samples puts others of the same bucket into their
places; all other positions stay as they are. At the next pack the rows are set aside as `taken_down`.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from data_pipeline.formats.schema import DATASET_FILE, DatasetInfo, fingerprint, read_dataset_info
from data_pipeline.loading.loader import BatchOrder, Dataset, Exclusions, open_dataset
from data_pipeline.loading.mix import MixedOrder
from data_pipeline.loading.order import DataExceptions, SampleOrder
from data_pipeline.loading.taken_down import EFFECTIVE, FOLDER, Takedown, find_taken_down, list_takedowns, read_noted
from data_pipeline.packing.shards import make_plain_key
from data_pipeline.selection.choice import TRAINED_ON, TrainedOn
from data_pipeline.selection.row_values import RowValues
from infra import storage
from infra.codec import from_json, to_json
from infra.errors import UserError

Place = tuple[int, int]  # shard and row of a sample


@dataclass(frozen=True)
class Sighting:
    """What one run has to do with the images that were taken down."""

    run: str
    times: dict[str, int]
    """By key, how often the steps that led to the newest checkpoint were computed with the image."""
    undone: dict[str, int]
    """By key, how often it was in a bad batch, whose step was taken back and computed with stand-ins."""
    unsure: bool
    """Several ranks met shards that they could not read, perhaps not all at the same step."""


def take_down(uri: str, keys: Sequence[str], hashes: Sequence[str]) -> tuple[Takedown, bool]:
    """Write down which samples are taken down. The object, and whether it is new: the same request again changes
    nothing. `hashes`: of pixels (column `exact`), or SHA-256 of the source's file where the source gave one."""
    if not keys and not hashes:
        raise UserError("takedown: give --keys or --hashes of the images")
    wanted = frozenset(make_plain_key(key) for key in keys)
    digests = frozenset(text.lower() for text in hashes)
    name = fingerprint([sorted(wanted), sorted(digests)])
    for standing in list_takedowns(uri):
        if standing.name == name:
            return standing, False
    rows: list[tuple[str, int, str]] = []
    for split in read_dataset_info(uri).splits:
        rows += _find_samples(open_dataset(uri, split=split), wanted, digests)
    found = Takedown(tuple(sorted(wanted)), tuple(sorted(digests)), tuple(sorted(rows)), name)
    stored = {key: value for key, value in to_json(found).items() if key != "name"}
    new = storage.write_bytes_if_absent(
        storage.join(uri, FOLDER, f"{name}.json"), json.dumps(stored, indent=1).encode()
    )
    return found, new


def _find_samples(dataset: Dataset, keys: Collection[str], digests: Collection[str]) -> list[tuple[str, int, str]]:
    values = RowValues(dataset)
    if digests and not {"exact", "info"} <= values.names:
        raise UserError(f"{dataset.uri}: no column `signature`, so no hashes of pixels: give --keys")
    found = []
    for shard, table in values.read(["exact", "info"] if digests else []):
        for row, sample in enumerate(table.to_pylist()):
            if sample["key"] in keys or (digests and _matches(sample, digests)):
                found.append((dataset.index.tars[shard], row, sample["key"]))
    return found


def _matches(sample: dict, digests: Collection[str]) -> bool:
    return sample["exact"] in digests or json.loads(sample["info"] or "{}").get("sha256") in digests


def judge_taken_down(takedowns: Sequence[Takedown], measured: pa.Table, signatures: pa.Table | None) -> list[int]:
    """Rows of a canonical shard that were taken down, for the pack."""
    keys = {key for found in takedowns for key in found.keys}
    digests = {text for found in takedowns for text in found.hashes}
    exact = {} if signatures is None else dict(zip(signatures["row"].to_pylist(), signatures["exact"].to_pylist()))
    rows = measured.select(["row", "key", "info"]).to_pylist()
    return [
        row["row"]
        for row in rows
        if row["key"] in keys or (digests and _matches({"exact": exact.get(row["row"]), **row}, digests))
    ]


def find_runs(places: Sequence[str]) -> list[str]:
    """Run folders at or below these, by their recipe.json."""
    found: set[str] = set()
    for place in places:
        folders = {uri.rpartition("/")[0] for uri in storage.iter_files(place, suffix="/recipe.json")}
        with_data = {folder for folder in folders if storage.exists(f"{folder}/data.json")}
        if not with_data:  # of a name with a slip nobody must read that no run saw the image
            raise UserError(f"--runs {place}: no run there, no folder with recipe.json and data.json")
        found |= with_data
    return sorted(found)


def find_sightings(uri: str, takedown: Takedown, runs: Sequence[str]) -> list[Sighting]:
    """Of the runs that trained on this dataset. From recipe, images seen and order alone: no sample is read."""
    found = [_find_sighting(uri, takedown, run) for run in runs]
    return [sighting for sighting in found if sighting is not None]


def _find_sighting(uri: str, takedown: Takedown, run: str) -> Sighting | None:
    dataset, part = _open_data_of(uri, run)
    if dataset is None:
        return None
    recipe = json.loads(storage.read_bytes(storage.join(run, "recipe.json")))
    seed, batch = int(recipe["seed"]), int(recipe["global_batch"])
    images, exceptions, unsure = _read_progress(run)
    since = read_noted(storage.join(run, EFFECTIVE))
    steps = min(images, since.get(takedown.name, images)) // batch
    order = dataset.order(seed=seed, global_batch=batch)
    own, first_shard = dataset.list_parts()[dataset.datasets.index(part) if dataset.datasets else 0]
    counts = _count_samples(dataset, order, part, steps)
    times: Counter[str] = Counter()
    wanted = _locate(own, takedown)
    for shard, row, key in wanted:
        bucket_order = _order_of(dataset, order, part).bucket(own.index.buckets[shard])
        num_given = counts.get(bucket_order.bucket, 0)
        passes = range(-(-num_given // bucket_order.num_samples))
        times[key] += sum(bucket_order.invert(shard, row, number) < num_given for number in passes)
    undone: Counter[str] = Counter()
    key_of = {(first_shard + shard, row): key for shard, row, key in wanted}
    for position, place, stand_in in _find_stand_ins(dataset, order, exceptions, since, steps):
        if place in key_of:
            times[key_of[place]] -= 1
            undone[key_of[place]] += position in exceptions.positions
        if stand_in in key_of:
            times[key_of[stand_in]] += 1
    return Sighting(run, dict(+times), dict(+undone), unsure)


def _find_stand_ins(
    dataset: Dataset, order: BatchOrder, exceptions: DataExceptions, since: Mapping[str, int], steps: int
) -> Iterator[tuple[int, Place, Place]]:
    """(position, its own sample, the one that took its place) in the first steps of a run: by the loader's own rule,
    for the steps where something was left out."""
    numbers = {tar: number for number, tar in enumerate(dataset.index.tars)}
    banned = {numbers[tar]: exceptions.since.get(tar, 0) for tar in exceptions.shards if tar in numbers}
    taken: dict[Place, int] = {}
    for own, start in dataset.list_parts():
        effective = [takedown for takedown in own.takedowns if takedown.name in since]
        for takedown in sorted(effective, key=lambda takedown: since[takedown.name]):
            for shard, row in find_taken_down([takedown], own.index):
                taken.setdefault((start + shard, row), since[takedown.name])
    batch = order.global_batch
    from_step = min([*banned.values(), *taken.values(), steps * batch]) // batch
    chosen = {position // batch for position in exceptions.positions} | set(range(from_step, steps))
    for step in sorted(step for step in chosen if step < steps):
        plan, first = order.batch(step), step * batch
        places = list(zip(plan.shard_G.tolist(), plan.row_G.tolist()))
        left_out = Exclusions(
            frozenset(shard for shard, start in banned.items() if start <= first),
            exceptions.positions,
            frozenset(place for place, start in taken.items() if start <= first),
        )
        for at, stand_in in left_out.find_stand_ins(order, plan.bucket, range(first, first + batch), places):
            yield first + at, places[at], stand_in


def _open_data_of(uri: str, run: str) -> tuple[Dataset | None, str]:
    """(the data of a run, the name in them of the dataset at `uri`); (None, "") where the run has nothing to do with
    it. A table of shards is named by its content and stays when a dataset grows: by it a dataset is recognised."""
    record = storage.join(run, TRAINED_ON)
    if storage.exists(record):
        trained_on = from_json(TrainedOn, storage.read_bytes(record), where=record)
        for name, part in trained_on.parts.items():
            if storage.exists(storage.join(uri, part.info.splits["train"].index)):
                return trained_on.open({name: uri}), name
        return None, ""
    path = storage.join(run, "data.json")
    info = DatasetInfo.from_bytes(storage.read_bytes(path), path)
    if "train" in info.splits and storage.exists(storage.join(uri, info.splits["train"].index)):
        return Dataset(uri, info, "train"), ""
    return None, ""


def _locate(dataset: Dataset, takedown: Takedown) -> list[tuple[int, int, str]]:
    """(shard, row, key) in the shards that a run read, which may be those of an earlier pack; only kept rows."""
    numbers = {tar: number for number, tar in enumerate(dataset.index.tars)}
    known = [(numbers[tar], row, key) for tar, row, key in takedown.rows if tar in numbers]
    if not known:
        places = _find_samples(dataset, takedown.keys, takedown.hashes)
        known = [(numbers[tar], row, key) for tar, row, key in places]
    return [place for place in known if dataset.kept is None or place[1] in dataset.kept.rows_of(place[0])]


def _order_of(dataset: Dataset, order: object, part: str) -> SampleOrder:
    if isinstance(order, MixedOrder):
        return order.orders[dataset.datasets.index(part)]
    assert isinstance(order, SampleOrder)
    return order


def _count_samples(dataset: Dataset, order: object, part: str, steps: int) -> dict[str, int]:
    """Samples of each bucket that the dataset gave to the first steps."""
    if isinstance(order, MixedOrder):
        number = dataset.datasets.index(part)
        return {bucket: count for (n, bucket), count in order.count_samples(steps).items() if n == number}
    assert isinstance(order, SampleOrder)
    return {bucket: count * order.global_batch for bucket, count in order.count_before(steps).items()}


def _read_progress(run: str) -> tuple[int, DataExceptions, bool]:
    """(images behind the newest checkpoint, what any rank left out of the data, whether ranks may differ in it)."""
    manifests = storage.list_files(storage.join(run, "checkpoints"), suffix="/manifest.json")
    if not manifests:
        return 0, DataExceptions(), False
    state = json.loads(storage.read_bytes(manifests[-1]))["state"]
    folder, exceptions = manifests[-1].rpartition("/")[0], DataExceptions()
    ranks = [uri for uri in storage.list_files(folder, suffix=".json") if "/rank_" in uri]
    for uri in ranks:
        progress = json.loads(storage.read_bytes(uri))
        exceptions |= from_json(DataExceptions, progress.get("extra", progress).get("exceptions", {}), where=uri)
    return int(state["images_seen"]), exceptions, len(ranks) > 1 and bool(exceptions.shards)


def describe_takedown(uri: str, takedown: Takedown, new: bool, sightings: Sequence[Sighting], *, runs: int) -> str:
    """What was done, for people."""
    keys = sorted({key for _, _, key in takedown.rows})
    lines = [
        f"{uri}: {len(takedown.rows)} samples {'are taken down' if new else 'were taken down before'} "
        f"({', '.join(keys[:5])}{' ...' if len(keys) > 5 else ''}): {FOLDER}/{takedown.name}.json"
    ]
    lost = sorted(set(takedown.keys) - set(keys))
    if lost:
        lines.append(f"no sample has the keys {', '.join(lost[:5])}: a later pack leaves them out")
    if takedown.hashes and not takedown.rows:
        lines.append(f"no sample has the hashes {', '.join(takedown.hashes[:5])}: a later pack leaves them out")
    lines.append(
        "trainings that start from now on read other images in their places; the next run of the pipeline packs "
        f"shards without them. Tars that {DATASET_FILE} no longer names, and columns/, keep the bytes: delete them"
    )
    if runs:
        lines.append(f"of {runs} runs, {sum(bool(s.times or s.undone) for s in sightings)} saw an image:")
    for sighting in sightings:
        shown = ", ".join(f"{key} {count} times" for key, count in sorted(sighting.times.items()))
        undone = ", ".join(
            f"{key} in {count} steps that were taken back" for key, count in sorted(sighting.undone.items())
        )
        more = "ranks met shards that they could not read: perhaps more often" if sighting.unsure else ""
        if shown or undone or more:
            lines.append(f"  {sighting.run}: {'; '.join(filter(None, [shown, undone, more]))}")
    return "\n".join(lines)
