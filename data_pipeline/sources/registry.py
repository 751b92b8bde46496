"""SOURCES: every layout that raw images may come in. To add one, write a class beside this file and a line below."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from data_pipeline.sources.cc12m import Cc12mSource
from data_pipeline.sources.coco import CocoSource
from data_pipeline.sources.folder import FolderSource
from data_pipeline.sources.huggingface import HuggingFaceSource
from data_pipeline.sources.imagenet import ImageNetSource
from data_pipeline.sources.parquet import ParquetSource
from data_pipeline.sources.source import IMAGE_SUFFIXES, RawRow, Source, SourceOptions, SourceUnit
from data_pipeline.sources.webdataset import TAR_SUFFIXES, WebDatasetSource
from infra import storage
from infra.errors import MissingError, UserError, nearest
from infra.log import get_logger

log = get_logger("sources")

SOURCES: dict[str, Callable[[str, SourceOptions], Source]] = {
    "folder": FolderSource,
    "wds": WebDatasetSource,
    "parquet": ParquetSource,
    "hf": HuggingFaceSource,
    "imagenet": ImageNetSource,
    "coco": CocoSource,
    "cc12m": Cc12mSource,
}


def open_source(text: str, options: SourceOptions = SourceOptions()) -> Source:  # noqa: B008 - frozen
    """`KIND:URI` as the command line gives it, e.g. `folder:/photos` or `wds:s3://bucket/raw/{000..099}.tar`."""
    kind, colon, uri = text.partition(":")
    if not colon or kind not in SOURCES:
        raise UserError(
            f"source {text!r}: expected one of {', '.join(f'{k}:URI' for k in SOURCES)}{nearest(kind, SOURCES)}"
        )
    if not uri:
        raise UserError(f"source {text!r} names no place: write {kind}:/path or {kind}:s3://bucket/prefix")
    return SOURCES[kind](uri, options)


def guess_kind(uri: str) -> str:
    """The layout of a place by the names that lie there; UserError where there is nothing."""
    names = [uri] if "{" in uri else storage.list_files(uri, links=True) if uri else []
    if not names:
        raise MissingError(f"{uri or 'no source is named'}: no such file or folder, or nothing in it")
    relative = {name.removeprefix(uri.rstrip("/") + "/") for name in names}
    marks = {"LOC_synset_mapping.txt": "imagenet", "synset_words.txt": "imagenet",
             "annotations/captions_train2014.json": "coco", "annotations/captions_val2014.json": "coco"}  # fmt: skip
    for name, kind in marks.items():
        if name in relative:
            return kind
    if any(name.rsplit("/", 1)[-1] == "dataset_info.json" for name in relative):
        return "hf"
    images = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)
    for suffixes, kind in ((TAR_SUFFIXES, "wds"), (images, "folder"), ((".parquet",), "parquet"), ((".tsv",), "cc12m")):
        if any(name.lower().endswith(suffixes) for name in names):
            return kind
    return "folder"


def open_sources(texts: Sequence[str], options: SourceOptions = SourceOptions()) -> Source:  # noqa: B008 - frozen
    """One source, or several as one; a text that is given twice counts once."""
    found = tuple(open_source(text, options) for text in dict.fromkeys(texts))
    return found[0] if len(found) == 1 else CombinedSource(found)


@dataclass(frozen=True)
class CombinedSource:
    """Sources one after the other. Each unit keeps the id that its own source gives it: adding one redoes nothing."""

    sources: tuple[Source, ...]

    def list_units(self) -> list[SourceUnit]:
        found: dict[str, SourceUnit] = {}
        for number, source in enumerate(self.sources):
            units = source.list_units()
            again = sum(unit.id in found for unit in units)
            if again:  # equal ids are equal names and stamps: the same files, listed by two sources
                log.warning("%d of %d files of source %d are there already: read once", again, len(units), number + 1)
            for unit in units:
                found.setdefault(unit.id, SourceUnit(unit.id, unit.split, {"source": number, "where": unit.where}))
        return list(found.values())

    def read_rows(self, unit: SourceUnit) -> Iterator[RawRow]:
        inner = SourceUnit(unit.id, unit.split, unit.where["where"], unit.seen)
        return self.sources[unit.where["source"]].read_rows(inner)
