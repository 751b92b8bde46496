"""Data sets in the layouts that they are published in: Hugging Face's save_to_disk, ImageNet, COCO-2014, CC12M."""

import csv
import io
import json
import posixpath
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa

from data_pipeline.formats.schema import fingerprint
from data_pipeline.sources.fetch import Fetch, FetchError, fetch
from data_pipeline.sources.source import (
    FOLDER_ROWS,
    IMAGE_SUFFIXES,
    SPLITS,
    RawRow,
    SourceUnit,
    etags_below,
    existing,
    marks,
    read_row,
    split_name,
    stamp,
)
from infra import storage
from infra.errors import MissingError, UnavailableError, UserError, nearest

_DEAD_ROWS = 10  # with so many URLs of a file and not one answer, the network is down, not the images gone


def draw(seed: str, choices: Sequence[str]) -> str:
    """One of several, the same every time for the same row."""
    return random.Random(seed).choice(list(choices))


def fetch_rows(items: Sequence[tuple[str, str, str | None]], bounds: Fetch, where: str) -> Iterator[RawRow]:
    """(key, url, caption) to rows, in order; failed downloads are counted rows."""

    def one(item: tuple[str, str, str | None]) -> tuple[RawRow, bool]:
        key, url, caption = item
        try:
            return RawRow(key, fetch(url, bounds), caption, info={"url": url}), False
        except FetchError as error:
            return RawRow(key, None, caption, error.status, error.reason, {"url": url}), error.network

    with ThreadPoolExecutor(bounds.threads) as pool:
        done = list(pool.map(one, items))
    if len(done) >= _DEAD_ROWS and all(network for _, network in done):
        raise UnavailableError(f"{where}: not one of {len(done)} URLs answered: is the network up? Run it again then")
    yield from (row for row, _ in done)


@dataclass(frozen=True)
class HfSource:
    """A folder that `datasets` wrote with save_to_disk: Arrow files, one folder per split or none."""

    uri: str
    image_column: str = ""
    caption_column: str = ""

    def units(self) -> list[SourceUnit]:
        units, etags = [], etags_below(self.uri)
        for file in existing(self.uri, (".arrow",), "Arrow files of a data set (save_to_disk)"):
            folder = posixpath.dirname(file)
            if "/cache-" in file or not storage.exists(storage.join(folder, "dataset_info.json")):
                continue
            image, caption, names = self._columns(folder)
            relative = file.removeprefix(self.uri.rstrip("/") + "/")
            folder = relative.split("/")[0] if "/" in relative else self.uri.rstrip("/").rsplit("/", 1)[-1]
            split = split_name(folder.split("-")[0])
            label = (
                f"{split or 'all'}-{posixpath.basename(file)[:40]}-{fingerprint([relative, stamp(file, etags)])[:10]}"
            )
            where = {"file": file, "image": image, "caption": caption, "names": names}
            units.append(SourceUnit(label.replace(".", "_"), split, where))
        if not units:
            raise UserError(f"{self.uri}: no dataset_info.json beside its Arrow files: expected save_to_disk's output")
        return units

    def _columns(self, folder: str) -> tuple[str, str, list[str]]:
        """(image column, caption column, class names where the caption is a label)."""
        uri = storage.join(folder, "dataset_info.json")
        features: Mapping[str, Any] = json.loads(storage.read_bytes(uri)).get("features") or {}
        kinds = {name: str(f.get("_type", "")) if isinstance(f, dict) else "" for name, f in features.items()}
        images = [name for name, kind in kinds.items() if kind == "Image"]
        texts = [n for n, f in features.items() if kinds[n] == "Value" and f.get("dtype") in ("string", "large_string")]
        labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
        image = self.image_column or (images[0] if images else "")
        known = [name for name in ("caption", "text", "prompt", "description") if name in texts]
        caption = self.caption_column or next(iter([*known, *texts, *labels]), "")
        for what, name in (("image", image), ("caption", caption)):
            if name not in features:
                raise UserError(f"{uri}: no {what} column {name}; it has {', '.join(features)}: name it with "
                                f"--{what}-column{nearest(name, features) if name else ''}")  # fmt: skip
        return image, caption, list(features[caption].get("names") or []) if caption in labels else []

    def rows(self, unit: SourceUnit) -> Iterator[RawRow]:
        where, names = unit.where, unit.where["names"]
        number = 0
        try:
            with storage.open_read(where["file"]) as stream, pa.ipc.open_stream(stream) as reader:
                for batch in reader:
                    columns = (batch.column(where[name]).to_pylist() for name in ("image", "caption"))
                    for image, said in zip(*columns):
                        caption = f"a photo of a {names[said]}" if names and said is not None else said
                        yield self._row(f"{unit.id}-{number:06d}", image, caption, where["file"])
                        number += 1
        except pa.ArrowInvalid as error:
            reason = f"readable up to row {number}, then: {str(error).splitlines()[0][:120]}"
            yield RawRow(posixpath.basename(where["file"]), None, None, "truncated_arrow", reason)

    @staticmethod
    def _row(key: str, image: Any, caption: str | None, file: str) -> RawRow:
        value = (image or {}).get("bytes") or (image or {}).get("path") if isinstance(image, dict) else image
        if not value:
            return RawRow(key, None, caption, "no_image", "the cell is empty")
        if isinstance(value, bytes):
            return RawRow(key, value, caption)
        absolute = storage.is_remote(value) or value.startswith("/")
        return read_row(key, value if absolute else storage.join(posixpath.dirname(file), value), caption)


@dataclass(frozen=True)
class ImageNetSource:
    """train/n01440764/*.JPEG and val/ (by class, or flat with LOC_val_solution.csv), names in LOC_synset_mapping.txt.

    The caption is "a photo of a <class name>", the name drawn among the class's own (SD3's protocol for its study).
    """

    uri: str

    def units(self) -> list[SourceUnit]:
        names, solution, etags = self._names(), self._solution(), etags_below(self.uri)
        root = self.uri.rstrip("/") + "/"
        rows: dict[tuple[str, str], list[list[str]]] = {}
        for file in existing(self.uri, tuple(f".{s}" for s in IMAGE_SUFFIXES), "images"):
            relative = file.removeprefix(root)
            folders = relative.split("/")[:-1]
            split = next((split_name(folder) for folder in folders if split_name(folder)), "")
            stem = posixpath.basename(relative).rsplit(".", 1)[0]
            synset = folders[-1] if folders and folders[-1] in names else solution.get(stem, "")
            caption = f"a photo of a {draw(stem, names[synset])}" if synset in names else ""
            rows.setdefault((split, synset), []).append([relative, caption])
        units = []
        for (split, synset), found in sorted(rows.items()):
            for first in range(0, len(found), FOLDER_ROWS):
                chosen = found[first : first + FOLDER_ROWS]
                held = marks([root + relative for relative, _ in chosen], etags)
                mark = fingerprint([chosen, held])[:10]
                label = f"{split or 'all'}-{synset or 'none'}-{first // FOLDER_ROWS:05d}-{mark}"
                units.append(SourceUnit(label, split, {"rows": chosen}))
        return units

    def _names(self) -> dict[str, list[str]]:
        for name in ("LOC_synset_mapping.txt", "synset_words.txt"):
            uri = storage.join(self.uri, name)
            if storage.exists(uri):
                lines = storage.read_bytes(uri).decode().splitlines()
                pairs = (line.partition(" ") for line in lines if line.strip())
                return {synset: [word.strip() for word in words.split(",")] for synset, _, words in pairs}
        raise MissingError(f"{self.uri}: no LOC_synset_mapping.txt (or synset_words.txt), so no class has a name: "
                           "it lies in ImageNet's archive beside ILSVRC/")  # fmt: skip

    def _solution(self) -> dict[str, str]:
        uri = storage.join(self.uri, "LOC_val_solution.csv")
        if not storage.exists(uri):
            return {}
        lines = csv.DictReader(io.StringIO(storage.read_bytes(uri).decode()))
        return {line["ImageId"]: line["PredictionString"].split()[0] for line in lines}

    def rows(self, unit: SourceUnit) -> Iterator[RawRow]:
        for relative, caption in unit.where["rows"]:
            yield read_row(relative, storage.join(self.uri, relative), caption)


@dataclass(frozen=True)
class CocoSource:
    """COCO-2014: annotations/captions_{train,val}2014.json with the images beside; one of the captions is drawn."""

    uri: str

    def units(self) -> list[SourceUnit]:
        units, etags = [], etags_below(self.uri)
        for split in SPLITS:
            uri = storage.join(self.uri, f"annotations/captions_{split}2014.json")
            if not storage.exists(uri):
                continue
            files, captions = self._read(uri)
            rows = [
                [f"{split}2014/{name}", draw(name, captions[number]) if captions.get(number) else ""]
                for number, name in sorted(files.items())
            ]
            for first in range(0, len(rows), FOLDER_ROWS):
                chosen = rows[first : first + FOLDER_ROWS]
                held = marks([storage.join(self.uri, relative) for relative, _ in chosen], etags)
                label = f"{split}-coco2014-{first // FOLDER_ROWS:05d}-{fingerprint([chosen, held])[:10]}"
                units.append(SourceUnit(label, split, {"rows": chosen}))
        if not units:
            raise MissingError(f"{self.uri}: no annotations/captions_val2014.json there: expected COCO-2014's layout")
        return units

    @staticmethod
    def _read(uri: str) -> tuple[dict[int, str], dict[int, list[str]]]:
        try:
            data = json.loads(storage.read_bytes(uri))
            files = {int(image["id"]): str(image["file_name"]) for image in data["images"]}
            captions: dict[int, list[str]] = {}
            for said in sorted(data["annotations"], key=lambda said: said["id"]):
                captions.setdefault(int(said["image_id"]), []).append(" ".join(str(said["caption"]).split()))
            return files, captions
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{uri}: not COCO's captions ({type(error).__name__}: {error})") from error

    def rows(self, unit: SourceUnit) -> Iterator[RawRow]:
        for relative, caption in unit.where["rows"]:
            yield read_row(relative, storage.join(self.uri, relative), caption)


@dataclass(frozen=True)
class Cc12mSource:
    """cc12m.tsv (url, tab, caption), fetched within bounds. For all of it img2dataset and `wds:` are the better way."""

    uri: str
    fetch: Fetch = Fetch()  # noqa: RUF009 - frozen
    rows_per_unit: int = 1000

    def units(self) -> list[SourceUnit]:
        units, etags = [], etags_below(self.uri)
        for file in existing(self.uri, (".tsv",), "TSV files of url and caption"):
            offsets, held = self._offsets(storage.read_bytes(file)), stamp(file, etags)
            stem = posixpath.basename(file).rsplit(".", 1)[0]
            for number, (first, behind) in enumerate(pairwise(offsets)):
                mark = fingerprint([posixpath.basename(file), held, first])[:10]
                where = {"file": file, "start": first, "length": behind - first, "number": number}
                units.append(SourceUnit(f"all-{stem[-40:]}-{number:06d}-{mark}", "", where))
        return units

    def _offsets(self, data: bytes) -> list[int]:
        """Where units begin, and the end."""
        offsets, at, lines = [0], 0, 0
        while (newline := data.find(b"\n", at)) >= 0:
            at, lines = newline + 1, lines + 1
            if lines % self.rows_per_unit == 0:
                offsets.append(at)
        return offsets if offsets[-1] == len(data) else [*offsets, len(data)]

    def rows(self, unit: SourceUnit) -> Iterator[RawRow]:
        where = unit.where
        text = storage.read_bytes(where["file"], where["start"], where["length"]).decode("utf-8", "replace")
        items, bad = [], []
        for number, line in enumerate(text.split("\n")):
            if not line.strip():
                continue
            url, tab, caption = line.rstrip("\r").partition("\t")
            key = f"{where['number']:06d}-{number:06d}"
            if tab:
                items.append((key, url, caption))
            else:
                bad.append(RawRow(key, None, None, "no_image", "a line without a tab"))
        yield from fetch_rows(items, self.fetch, where["file"])
        yield from bad
