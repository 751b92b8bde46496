"""Hugging Face's `datasets`, as its save_to_disk writes them: Arrow files, one folder per split or none."""

import json
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from data_pipeline.formats.schema import fingerprint
from data_pipeline.sources.captions import choose_caption_column, is_text
from data_pipeline.sources.parquet import read_images
from data_pipeline.sources.source import (
    FoundField,
    RawRow,
    SourceOptions,
    SourceUnit,
    list_etags,
    list_existing,
    parse_split,
    stamp_file,
)
from infra import storage
from infra.errors import UserError, nearest


@dataclass(frozen=True)
class HuggingFaceSource:
    """A folder that `datasets` wrote with save_to_disk: Arrow files, one folder per split or none."""

    uri: str
    options: SourceOptions = SourceOptions()  # noqa: RUF009 - frozen

    def list_units(self) -> list[SourceUnit]:
        units, etags = [], list_etags(self.uri)
        for file in list_existing(self.uri, (".arrow",), "Arrow files of a data set (save_to_disk)"):
            folder = posixpath.dirname(file)
            if "/cache-" in file or not storage.exists(storage.join(folder, "dataset_info.json")):
                continue
            image, caption, names = self._columns(folder)
            relative = file.removeprefix(self.uri.rstrip("/") + "/")
            folder = relative.split("/")[0] if "/" in relative else self.uri.rstrip("/").rsplit("/", 1)[-1]
            split = parse_split(folder.split("-")[0])
            mark = fingerprint([relative, stamp_file(file, etags)])[:10]
            label = f"{split or 'all'}-{posixpath.basename(file)[:40]}-{mark}"
            where = {"file": file, "image": image, "caption": caption, "names": names}
            units.append(SourceUnit(label.replace(".", "_"), split, where))
        if not units:
            raise UserError(f"{self.uri}: no dataset_info.json beside its Arrow files: expected save_to_disk's output")
        return units

    def list_fields(self) -> list[FoundField]:
        """Features of the first folder that has them."""
        found = [name for name in storage.list_files(self.uri) if posixpath.basename(name) == "dataset_info.json"]
        features = _read_features(found[0]) if found else {}
        kinds = {name: kind if isinstance(kind, Mapping) else {} for name, kind in features.items()}
        return [FoundField(name, str(kind.get("dtype") or kind.get("_type") or "list")) for name, kind in kinds.items()]

    def _columns(self, folder: str) -> tuple[str, str, list[str]]:
        """(image column, caption column, class names where the caption is a label)."""
        uri = storage.join(folder, "dataset_info.json")
        features = _read_features(uri)
        kinds = {name: _name_kind(feature) for name, feature in features.items()}
        images = [name for name, kind in kinds.items() if kind == "Image"]
        images.sort(key=lambda name: isinstance(features[name], list) or "feature" in features[name])  # lists last
        labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
        image = self.options.image_column or (images[0] if images else "")
        if image not in features:
            raise UserError(f"{uri}: no image column {image}; it has {', '.join(features)}: name it with "
                            f"--image-column{nearest(image, features) if image else ''}")  # fmt: skip
        types = {name: _to_arrow_type(feature) for name, feature in features.items()}
        column = self.options.caption_column
        if column in labels or (not column and len(labels) == 1 and not any(map(is_text, types.values()))):
            caption = column or labels[0]
            return image, caption, list(features[caption].get("names") or [])
        return image, choose_caption_column(types, column, uri), []

    def read_rows(self, unit: SourceUnit) -> Iterator[RawRow]:
        where, names = unit.where, unit.where["names"]
        number = end = 0
        seen = unit.seen
        try:
            with storage.open_read(where["file"]) as stream, pa.ipc.open_stream(stream) as reader:
                for batch in reader:
                    end = stream.tell()
                    columns = (batch.column(where[name]).to_pylist() for name in ("image", "caption"))
                    for image, label in zip(*columns):
                        caption = f"a photo of a {names[label]}" if names and label is not None else label
                        yield from read_images(f"{unit.id}-{number:06d}", image, caption, where["file"])
                        number += 1
                        seen["record"] += 1
        except (pa.ArrowException, OSError) as error:  # a body that breaks off is an OSError
            if isinstance(error, UserError):
                raise
            rest = storage.get_size(where["file"]) - end
            reason = f"readable up to row {number} at byte {end:,}, then: {str(error).splitlines()[0][:120]}"
            seen.update({"unreadable ranges": 1, "unreadable bytes": rest})
            yield RawRow(posixpath.basename(where["file"]), None, None, "truncated_arrow", reason)


def _read_features(uri: str) -> Mapping[str, Any]:
    try:
        features = json.loads(storage.read_bytes(uri)).get("features") or {}
        return dict(features)
    except (ValueError, AttributeError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{uri}: not what save_to_disk writes ({reason}): save it again") from error


def _name_kind(feature: object) -> str:
    """Image also for a list of images."""
    if isinstance(feature, list) and feature:
        return _name_kind(feature[0])
    if not isinstance(feature, Mapping):
        return ""
    if feature.get("_type") in ("Sequence", "List", "LargeList"):
        inner = _name_kind(feature.get("feature"))
        return inner if inner == "Image" else ""
    return str(feature.get("_type", ""))


def _to_arrow_type(feature: object) -> pa.DataType:
    """What `datasets` calls a Value of strings, or a list or Sequence of them, in pyarrow's terms; null for others."""
    if isinstance(feature, list) and feature:
        return pa.list_(_to_arrow_type(feature[0]))
    if not isinstance(feature, Mapping):
        return pa.null()
    if feature.get("_type") in ("Sequence", "List", "LargeList"):
        return pa.list_(_to_arrow_type(feature.get("feature")))
    if feature.get("_type") == "Value":
        return pa.string() if feature.get("dtype") in ("string", "large_string") else pa.float64()
    return pa.null()
