"""Couplings, read: latents from their own shards, noise drawn again, text out of the dataset of prompts.

`Prompts` finds the text of couplings, for the workers that make them and for training alike.
"""
# Shapes: B batch, C latent channels, H and W latent height and width.

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from data_pipeline.formats.couplings import Couplings, PromptOrder, parse_key
from data_pipeline.formats.schema import DATASET_FILE, DatasetInfo, SplitInfo, read_dataset_info
from data_pipeline.loading.batch import LatentBatch
from data_pipeline.loading.collate import DrawSettings
from data_pipeline.loading.loader import Dataset
from infra import storage
from infra.errors import UserError
from model.encoders.text import TextCond


def locate_prompts(root: str, couplings: Couplings) -> str:
    """URI of the dataset that holds the text."""
    inside = "/" not in couplings.prompts
    return storage.join(root, couplings.prompts) if inside else couplings.prompts


class Prompts:
    """The text of couplings, by index."""

    def __init__(self, root: str, couplings: Couplings) -> None:
        self.uri, split = locate_prompts(root, couplings), couplings.prompts_split
        exist = (storage.exists(storage.join(self.uri, name)) for name in (DATASET_FILE, couplings.prompts_index))
        if not all(exist):
            raise UserError(
                f"{root}: the text of these couplings is not at {self.uri}: bring that dataset back, or say where it "
                "is by `python -m data_pipeline couple` with the same options and another --prompts"
            )
        # Pinned to the shards that the couplings were made of: the dataset may have grown since.
        pinned = {split: SplitInfo(couplings.prompts_index, 0, 0, {})}
        self.dataset = Dataset(self.uri, replace(read_dataset_info(self.uri), splits=pinned), split)
        self.order = PromptOrder(couplings, self.dataset.num_samples)
        self._couplings = couplings

    def buckets_of(self, index_I: np.ndarray) -> np.ndarray:
        """The bucket of each coupling's picture."""
        if self._couplings.bucket:
            return np.full(len(index_I), self._couplings.bucket)
        shard_I, _ = self.dataset.index.locate(self.order.prompts_of(index_I))
        return np.array(self.dataset.index.buckets)[shard_I]

    def choose_captions(self, index_B: np.ndarray) -> list[str]:
        """Which caption of its prompt each coupling takes: keyed by its index, among those that the prompt has."""
        draws = DrawSettings(self._couplings.seed, self._couplings.captions, 0.0)
        return self.dataset.choose_captions(self._places(index_B), index_B, draws)

    def read(
        self, index_B: np.ndarray, captions: Sequence[str], positions: np.ndarray, draws: DrawSettings
    ) -> tuple[TextCond, list[str]]:
        """(features, words) of these captions; encoders are dropped as `draws` says at `positions`."""
        found: list[LatentBatch] = []
        rows: list[int] = []
        places, names = self._places(index_B), np.array(captions)
        for name in dict.fromkeys(captions):
            rows_of_name = np.flatnonzero(names == name)
            chosen = replace(draws, caption_weights={name: 1.0})
            for bucket in dict.fromkeys(self.dataset.index.buckets[places[b][0]] for b in rows_of_name):
                part = [int(b) for b in rows_of_name if self.dataset.index.buckets[places[b][0]] == bucket]
                found.append(self.dataset.at([places[b] for b in part], positions[part].tolist(), chosen))
                rows += part
        order_B = torch.from_numpy(np.argsort(rows))
        words = [word for batch in found for word in batch.captions]
        text = found[0].text if len(found) == 1 else TextCond.cat([batch.text for batch in found])
        return text if len(found) == 1 else text[order_B], [words[at] for at in order_B.tolist()]

    def _places(self, index_B: np.ndarray) -> list[tuple[int, int]]:
        shards, rows = self.dataset.index.locate(self.order.prompts_of(index_B))
        return list(zip(shards.tolist(), rows.tolist()))


class CoupledDataset(Dataset):
    """A split of couplings: each batch carries the noise that its latents were made of."""

    def __init__(self, uri: str, info: DatasetInfo, split: str) -> None:
        super().__init__(uri, info, split)
        assert info.couplings is not None
        self.couplings = info.couplings
        self.prompts = Prompts(uri, info.couplings)

    @torch.inference_mode(False)  # as in Collator.collate: threads write into the batch
    def _load(
        self, positions: np.ndarray, places: Sequence[tuple[int, int]], bucket: str, draws: DrawSettings
    ) -> LatentBatch:
        rows = [(self._reader.table(shard), row) for shard, row in places]
        keys = [table.keys[row] for table, row in rows]
        shape = self.latent_shape(bucket)
        latent_BCHW = torch.empty(len(rows), *shape)

        def fill(part: range) -> None:
            for b in part:
                data = self._reader.read(*places[b]).view(np.float16)
                if data.size != latent_BCHW[b].numel():
                    raise UserError(f"{self.uri}: {keys[b]} is no latent of bucket {bucket}: make the couplings again")
                latent_BCHW[b] = torch.from_numpy(data).view(shape)

        self._reader.spread(len(rows), fill)
        index_B = np.array([parse_key(key) for key in keys])
        # Of each coupling one caption is stored, the one that the teacher drew.
        caption_names = [next(name for name, words in table.captions.items() if words[row]) for table, row in rows]
        text, captions = self.prompts.read(index_B, caption_names, positions, draws)
        return LatentBatch(
            latent_BCHW=self.vae.normalise(latent_BCHW),
            text=text,
            positions=torch.from_numpy(positions.astype(np.int64)),  # type: ignore[arg-type]
            keys=keys,
            captions=captions,
            noise_BCHW=self.couplings.draw_noise(index_B.tolist(), shape),
        )
