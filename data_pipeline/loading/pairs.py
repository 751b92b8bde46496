"""Preference pairs, read: the rejected picture of each preferred sample. `packing/pairs.py` writes such datasets."""

from torch import Tensor

from data_pipeline.formats.schema import name_rejected_split
from data_pipeline.loading.batch import LatentBatch
from data_pipeline.loading.collate import DrawSettings
from data_pipeline.loading.index import RowTables
from data_pipeline.loading.loader import Dataset, open_dataset
from infra.errors import UserError


class RejectedLatents:
    """The rejected half of each preferred sample, found by its key; UserError unless the two splits fit together."""

    def __init__(self, preferred: Dataset) -> None:
        split = name_rejected_split(preferred.split)
        if split not in preferred.info.splits:
            raise UserError(
                f"{preferred.uri}: no preference pairs, it has splits {', '.join(preferred.info.splits)}; make some "
                "with `python -m eval pairs` or `python -m data_pipeline pairs`"
            )
        self._rejected = open_dataset(preferred.uri, split=split)
        samples, partners = _index_samples(preferred), _index_samples(self._rejected)
        both = samples.keys() | partners.keys()
        odd = sorted(key for key in both if samples.get(key, "")[1:] != partners.get(key, "")[1:])
        if odd:
            raise UserError(
                f"{preferred.uri}: {len(odd)} of the samples in {preferred.split} and {split} have no partner with the "
                f"same caption and bucket (first: {odd[0]}): make the pairs again"
            )
        self._places = {key: place for key, (place, _) in partners.items()}

    def __call__(self, batch: LatentBatch, draws: DrawSettings) -> Tensor:
        """Latents of the other halves, drawn with the same noise as the preferred ones."""
        places = [self._places[key] for key in batch.keys]
        return self._rejected.at(places, batch.positions.tolist(), draws).latent_BCHW


def _index_samples(dataset: Dataset) -> dict[str, tuple[tuple[int, int], tuple[str, ...]]]:
    """key -> ((shard, row), its bucket and captions)."""
    tables, found = RowTables(dataset.index), {}
    for shard, bucket in enumerate(dataset.index.buckets):
        rows = tables[shard]
        for row, key in enumerate(rows.keys):
            found[key] = (shard, row), (bucket, *(texts[row] for texts in rows.captions.values()))
    if len(found) < dataset.num_samples:
        raise UserError(f"{dataset.uri}: split {dataset.split} has keys that occur twice: make the pairs again")
    return found
