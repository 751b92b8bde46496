"""Where raw images come from: folders, tars, tables, published layouts, or several. A source lists units, reads one."""

import dataclasses
import json
import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from data_pipeline.formats.parquet_io import read_table
from data_pipeline.formats.schema import fingerprint
from data_pipeline.sources.fetch import Fetch
from data_pipeline.sources.layouts import Cc12mSource, CocoSource, HfSource, ImageNetSource
from data_pipeline.sources.parquet import ParquetSource
from data_pipeline.sources.source import (
    FOLDER_ROWS,
    IMAGE_SUFFIXES,
    MAX_IMAGE_BYTES,
    TEXT_SUFFIXES,
    RawRow,
    Source,
    SourceUnit,
    etags_below,
    existing,
    split_of,
    stamp,
)
from infra import storage
from infra.errors import MissingError, UnavailableError, UserError, nearest
from infra.log import get_logger

log = get_logger("sources")


def parse_sources(
    texts: Sequence[str], *, image_column: str = "", caption_column: str = "", fetch: Fetch, fetch_urls: bool = False
) -> Source:
    """One source, or several as one. `fetch_urls` is about parquet; CC12M has nothing but URLs."""
    found = tuple(
        parse_source(
            text,
            image_column=image_column,
            caption_column=caption_column,
            fetch=fetch if fetch_urls or text.startswith("cc12m:") else None,
        )
        for text in dict.fromkeys(texts)
    )
    return found[0] if len(found) == 1 else SeveralSources(found)


def parse_source(text: str, *, image_column: str = "", caption_column: str = "", fetch: Fetch | None = None) -> Source:
    """`folder:/path`, `wds:URI` (folder or brace pattern), `parquet:/path`, `hf:`, `imagenet:`, `coco:` or `cc12m:`.

    `fetch` None leaves URLs in parquet files alone.
    """
    kind, colon, where = text.partition(":")
    if not colon or kind not in SOURCES:
        raise UserError(
            f"source {text!r}: expected one of {', '.join(f'{k}:URI' for k in SOURCES)}{nearest(kind, SOURCES)}"
        )
    if not where:
        raise UserError(f"source {text!r} names no place: write {kind}:/path or {kind}:s3://bucket/prefix")
    if kind == "parquet":
        return ParquetSource(where, image_column, caption_column, fetch)
    if kind == "hf":
        return HfSource(where, image_column, caption_column)
    if kind == "cc12m":
        return Cc12mSource(where, fetch or Fetch())
    return SOURCES[kind](where)


@dataclass(frozen=True)
class FolderSource:
    """Images with captions in a .txt of the same name beside them."""

    uri: str

    def units(self) -> list[SourceUnit]:
        names = existing(self.uri, tuple(f".{s}" for s in IMAGE_SUFFIXES), "images")
        root, etags = self.uri.rstrip("/") + "/", etags_below(self.uri)
        texts = {name for name in storage.list_files(self.uri) if name.endswith(".txt")}
        by_split: dict[str, list[str]] = {}
        for name in names:
            by_split.setdefault(split_of(name.removeprefix(root)), []).append(name)
        units = []
        for split, files in by_split.items():
            for first in range(0, len(files), FOLDER_ROWS):
                rows = [self._row(name, root, texts, etags) for name in files[first : first + FOLDER_ROWS]]
                label = f"{split or 'all'}-{first // FOLDER_ROWS:05d}-{fingerprint(rows)[:10]}"
                units.append(SourceUnit(label, split, {"rows": [(image, text) for image, text, *_ in rows]}))
        return units

    @staticmethod
    def _row(name: str, root: str, texts: set[str], etags: Mapping[str, str]) -> list[object]:
        text = name.rsplit(".", 1)[0] + ".txt"
        stamps = [stamp(uri, etags) for uri in (name, text) if uri == name or uri in texts]
        return [name.removeprefix(root), text.removeprefix(root) if text in texts else None, *stamps]

    def rows(self, unit: SourceUnit) -> Iterator[RawRow]:
        for name, text in unit.where["rows"]:
            try:
                caption = storage.read_bytes(storage.join(self.uri, text)) if text else None
                image = storage.read_bytes(storage.join(self.uri, name))
            except UnavailableError:
                raise
            except UserError as error:
                yield RawRow(name, None, None, "unreadable", str(error))
                continue
            yield RawRow(name, image, caption)


@dataclass(frozen=True)
class WdsSource:
    """WebDataset tars: KEY.jpg, KEY.txt and, if there, KEY.json with `caption`.

    img2dataset writes such, and names the downloads that failed only in a table beside each tar (NNNNN.parquet).
    """

    uri: str

    def units(self) -> list[SourceUnit]:
        if "{" in self.uri:
            import braceexpand

            tars = list(braceexpand.braceexpand(self.uri))
            missing = [tar for tar in tars if not storage.exists(tar)]
            if missing:
                raise MissingError(f"{missing[0]}: no such file ({len(missing)} of {len(tars)} of {self.uri} missing)")
            root = posixpath.commonpath([posixpath.dirname(tar) for tar in tars]) if len(tars) > 1 else ""
            etags: Mapping[str, str] = {}
        else:
            tars, root = existing(self.uri, (".tar", ".tar.gz", ".tgz"), "tars"), self.uri
            etags = etags_below(self.uri)
        there = {uri for folder in {posixpath.dirname(tar) for tar in tars} for uri in _tables(folder)}
        units = []
        for tar in dict.fromkeys(tars):  # a shard listed twice is read once
            relative = tar.removeprefix(root.rstrip("/") + "/") if root else posixpath.basename(tar)
            stem = posixpath.basename(tar).split(".")[0]
            split = split_of(relative)
            label = f"{split or 'all'}-{stem[-40:]}-{fingerprint([relative, stamp(tar, etags)])[:10]}"
            table = posixpath.join(posixpath.dirname(tar), f"{stem}.parquet")
            # not part of the label: img2dataset writes both at once, and roots made before tables were read stay whole
            units.append(SourceUnit(label, split, {"tar": tar} | ({"table": table} if table in there else {})))
        return units

    def rows(self, unit: SourceUnit) -> Iterator[RawRow]:
        uri = unit.where["tar"]
        seen: set[str] = set()
        whole = True
        for row in self._tar_rows(uri):
            seen.add(row.key)
            whole = whole and row.status != "truncated_tar"
            yield row
        # of a tar that breaks off nobody knows which rows would have followed
        if whole and "table" in unit.where:
            yield from _not_downloaded(unit.where["table"], seen)

    @staticmethod
    def _tar_rows(uri: str) -> Iterator[RawRow]:
        key, good = "", 0
        members: dict[str, bytes] = {}
        try:
            with storage.open_read(uri) as file, tarfile.open(fileobj=file, mode="r|*") as archive:
                for member in archive:
                    archive.members = []  # type: ignore[attr-defined]  # it would remember every header
                    if member.isdir():
                        continue
                    problem = _bad_member(member)
                    if problem:
                        yield RawRow(member.name[:200], None, None, "bad_name", f"{problem} in {uri}")
                        continue
                    folder, name = posixpath.split(member.name.removeprefix("./"))
                    stem, _, suffix = name.partition(".")
                    # a member that is there already begins another row of the same key: a duplicate to be counted
                    if members and (key != posixpath.join(folder, stem) or suffix.lower() in members):
                        yield _tar_row(key, members)
                        members = {}
                    key = posixpath.join(folder, stem)
                    if member.size > MAX_IMAGE_BYTES:
                        yield RawRow(member.name, None, None, "too_large", f"{member.size:,} bytes in {uri}")
                        continue
                    content = archive.extractfile(member)
                    members[suffix.lower()] = content.read() if content else b""
                    good += 1
                if members:
                    yield _tar_row(key, members)
            if uri.endswith(".tar") and not _has_end(uri):
                # tarfile takes a file that breaks off inside a header for a complete one
                raise tarfile.ReadError("no end-of-archive mark: cut short?")
        except UserError:
            raise
        except (tarfile.TarError, EOFError, OSError) as error:
            # the entry being read when the file broke off is not trusted either
            reason = f"{uri}: readable up to member {good}, then: {str(error) or type(error).__name__}"
            yield RawRow(posixpath.basename(uri), None, None, "truncated_tar", reason)


def _tables(folder: str) -> list[str]:
    found = storage.list_files(folder or ".", suffix=".parquet", recursive=False)
    return [posixpath.join(folder, posixpath.basename(uri)) for uri in found]


def _not_downloaded(uri: str, seen: AbstractSet[str]) -> Iterator[RawRow]:
    """Rows of img2dataset's table that its tar lacks; another table that lies beside a tar has none."""
    table = read_table(storage.read_bytes(uri), uri)
    if not {"key", "status"} <= set(table.column_names):
        return
    for row in table.to_pylist():
        if str(row["key"]) not in seen:
            reason = str(row.get("error_message") or row["status"] or "in the table, not in the tar")
            info = {"url": row["url"]} if row.get("url") else {}
            yield RawRow(str(row["key"]), None, row.get("caption"), "no_image", reason, info)


def _has_end(uri: str) -> bool:
    size = storage.size(uri)
    return not any(storage.read_bytes(uri, max(0, size - 1024), 1024)) and size >= 1024


def _bad_member(member: tarfile.TarInfo) -> str:
    if not member.isfile():
        return "a link or device"
    parts = member.name.split("/")
    if member.name.startswith("/") or ".." in parts:
        return "a name that leaves the folder"
    return ""


def _tar_row(key: str, members: Mapping[str, bytes]) -> RawRow:
    info: dict[str, Any] = {}
    if "json" in members:
        try:
            loaded = json.loads(members["json"])
            info = loaded if isinstance(loaded, dict) else {}
        except ValueError:
            info = {}
    image = next((members[s] for s in IMAGE_SUFFIXES if s in members), None)
    text = next((members[s] for s in TEXT_SUFFIXES if s in members), info.get("caption"))
    if image is None:
        reason = str(info.get("error_message") or f"only {', '.join(sorted(members)) or 'nothing'}")
        return RawRow(key, None, text, "no_image", reason, info)
    return RawRow(key, image, text, info=info)


@dataclass(frozen=True)
class SeveralSources:
    """Sources one after the other. Each unit keeps the id that its own source gives it: adding one redoes nothing."""

    sources: tuple[Source, ...]

    def units(self) -> list[SourceUnit]:
        found: dict[str, SourceUnit] = {}
        for number, source in enumerate(self.sources):
            units = source.units()
            again = sum(unit.id in found for unit in units)
            if again:  # equal ids are equal names and stamps: the same files, listed by two sources
                log.warning("%d of %d files of source %d are there already: read once", again, len(units), number + 1)
            for unit in units:
                found.setdefault(unit.id, SourceUnit(unit.id, unit.split, {"source": number, "where": unit.where}))
        return list(found.values())

    def rows(self, unit: SourceUnit) -> Iterator[RawRow]:
        return self.sources[unit.where["source"]].rows(SourceUnit(unit.id, unit.split, unit.where["where"]))


SOURCES: Mapping[str, Any] = {
    "folder": FolderSource,
    "wds": WdsSource,
    "parquet": ParquetSource,
    "hf": HfSource,
    "imagenet": ImageNetSource,
    "coco": CocoSource,
    "cc12m": Cc12mSource,
}


def source_to_json(source: Source) -> dict[str, Any]:
    """So that a task can carry its source as plain data."""
    if isinstance(source, SeveralSources):
        return {"kind": "several", "sources": [source_to_json(one) for one in source.sources]}
    kind = next(name for name, cls in SOURCES.items() if isinstance(source, cls))
    return {"kind": kind, **dataclasses.asdict(source)}  # type: ignore[call-overload]


def source_from_json(data: Mapping[str, Any]) -> Source:
    if data["kind"] == "several":
        return SeveralSources(tuple(source_from_json(one) for one in data["sources"]))
    given = {key: value for key, value in data.items() if key != "kind"}
    if given.get("fetch"):
        given["fetch"] = Fetch(**{**given["fetch"], "allow_private": tuple(given["fetch"]["allow_private"])})
    return SOURCES[data["kind"]](**given)
