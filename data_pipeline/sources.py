"""Where raw images come from: folders, tars, parquet, and published layouts. A source lists units and reads one."""

import dataclasses
import json
import posixpath
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.fetch import Fetch
from data_pipeline.schema import fingerprint
from data_pipeline.source_layouts import Cc12mSource, CocoSource, HfSource, ImageNetSource, fetch_rows
from data_pipeline.source_rows import (
    FOLDER_ROWS,
    IMAGE_SUFFIXES,
    MAX_IMAGE_BYTES,
    SPLITS,
    TEXT_SUFFIXES,
    RawRow,
    Source,
    SourceUnit,
    existing,
    read_row,
    split_of,
    stamp,
)
from infra import storage
from infra.errors import MissingError, UnavailableError, UserError, nearest


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
        root = self.uri.rstrip("/") + "/"
        texts = {name for name in storage.list_files(self.uri) if name.endswith(".txt")}
        by_split: dict[str, list[str]] = {}
        for name in names:
            by_split.setdefault(split_of(name.removeprefix(root)), []).append(name)
        units = []
        for split, files in by_split.items():
            for first in range(0, len(files), FOLDER_ROWS):
                rows = [self._row(name, root, texts) for name in files[first : first + FOLDER_ROWS]]
                label = f"{split or 'all'}-{first // FOLDER_ROWS:05d}-{fingerprint(rows)[:10]}"
                units.append(SourceUnit(label, split, {"rows": [(image, text) for image, text, *_ in rows]}))
        return units

    def _row(self, name: str, root: str, texts: set[str]) -> list[object]:
        text = name.rsplit(".", 1)[0] + ".txt"
        stamps = [] if storage.is_remote(name) else [stamp(uri) for uri in (name, text) if uri == name or uri in texts]
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
    """WebDataset tars (img2dataset writes such): KEY.jpg, KEY.txt and, if there, KEY.json with `caption`."""

    uri: str

    def units(self) -> list[SourceUnit]:
        if "{" in self.uri:
            import braceexpand

            tars = list(braceexpand.braceexpand(self.uri))
            missing = [tar for tar in tars if not storage.exists(tar)]
            if missing:
                raise MissingError(f"{missing[0]}: no such file ({len(missing)} of {len(tars)} of {self.uri} missing)")
            root = posixpath.commonpath([posixpath.dirname(tar) for tar in tars]) if len(tars) > 1 else ""
        else:
            tars, root = existing(self.uri, (".tar", ".tar.gz", ".tgz"), "tars"), self.uri
        units = []
        for tar in dict.fromkeys(tars):  # a shard listed twice is read once
            relative = tar.removeprefix(root.rstrip("/") + "/") if root else posixpath.basename(tar)
            stem = posixpath.basename(tar).split(".")[0]
            split = split_of(relative)
            label = f"{split or 'all'}-{stem[-40:]}-{fingerprint([relative, stamp(tar)])[:10]}"
            units.append(SourceUnit(label, split, {"tar": tar}))
        return units

    def rows(self, unit: SourceUnit) -> Iterator[RawRow]:
        uri = unit.where["tar"]
        key, good = "", 0
        members: dict[str, bytes] = {}
        try:
            with storage.open_read(uri) as file, tarfile.open(fileobj=file, mode="r|*") as archive:
                for member in archive:
                    if member.isdir():
                        continue
                    problem = _bad_member(member)
                    if problem:
                        yield RawRow(member.name[:200], None, None, "bad_name", f"{problem} in {uri}")
                        continue
                    folder, name = posixpath.split(member.name.removeprefix("./"))
                    stem, _, suffix = name.partition(".")
                    if key != posixpath.join(folder, stem) and members:
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
        # img2dataset leaves the .json of an image that it could not fetch
        reason = str(info.get("error_message") or f"only {', '.join(sorted(members)) or 'nothing'}")
        return RawRow(key, None, text, "no_image", reason, info)
    return RawRow(key, image, text, info=info)


IMAGE_COLUMNS = ("image", "jpg", "png", "image_bytes", "bytes", "path", "image_path", "file")
CAPTION_COLUMNS = ("caption", "text", "txt", "TEXT", "prompt")


@dataclass(frozen=True)
class ParquetSource:
    """Parquet rows with image bytes (or Hugging Face's {bytes, path}, or a local path) and a caption."""

    uri: str
    image_column: str = ""
    caption_column: str = ""
    fetch: Fetch | None = None

    def units(self) -> list[SourceUnit]:
        units = []
        for file in existing(self.uri, (".parquet",), "parquet files"):
            with storage.open_read(file) as stream:
                parquet = _open_parquet(stream, file)
                image, caption = self._columns(parquet.schema_arrow, file)
                for group in range(parquet.num_row_groups):
                    where = {"file": file, "group": group, "image": image, "caption": caption}
                    relative = file.removeprefix(self.uri.rstrip("/") + "/")
                    stem = posixpath.basename(file).rsplit(".", 1)[0]
                    split = split_of(relative) or next((s for s in SPLITS if stem.startswith(f"{s}-")), "")
                    label = (
                        f"{split or 'all'}-{stem[-40:]}-{group:04d}-{fingerprint([relative, where, stamp(file)])[:10]}"
                    )
                    units.append(SourceUnit(label.replace(".", "_"), split, where))
        return units

    def _columns(self, schema: pa.Schema, file: str) -> tuple[str, str]:
        names = schema.names
        chosen = []
        for what, asked, known in (
            ("image", self.image_column, IMAGE_COLUMNS),
            ("caption", self.caption_column, CAPTION_COLUMNS),
        ):
            name = asked or next((k for k in known if k in names), "")
            urls = [n for n in names if n.lower() == "url"]
            if what == "image" and not name and urls:
                if self.fetch is None:
                    raise UserError(
                        f"{file}: holds urls, not images: fetch them with img2dataset, then use wds:FOLDER; "
                        "or, for not too many, add --fetch-urls"
                    )
                name = urls[0]
            if name not in names:
                raise UserError(
                    f"{file}: no {what} column {name or 'named ' + ' or '.join(known[:4])}; it has {', '.join(names)}: "
                    f"name it with --{what}-column{nearest(name, names) if name else ''}"
                )
            chosen.append(name)
        return chosen[0], chosen[1]

    def rows(self, unit: SourceUnit) -> Iterator[RawRow]:
        where = unit.where
        with storage.open_read(where["file"]) as stream:
            parquet = _open_parquet(stream, where["file"])
            names = [where["image"], where["caption"]]
            has_key = "key" in parquet.schema_arrow.names
            wanted = [*names, *(["key"] if has_key else [])]
            table = parquet.read_row_group(where["group"], columns=wanted, use_threads=False)  # as index.read_table
        rows = table.to_pylist()
        keys = [str(row["key"]) if has_key else f"{where['group']:04d}-{n:06d}" for n, row in enumerate(rows)]
        if self.fetch is not None and where["image"].lower() == "url":
            found = zip(keys, rows)
            items = [(key, str(row[where["image"]] or ""), row[where["caption"]]) for key, row in found]
            yield from fetch_rows(items, self.fetch, where["file"])
            return
        for key, row in zip(keys, rows):
            value = row[where["image"]]
            if isinstance(value, dict):
                value = value.get("bytes") or value.get("path")
            if isinstance(value, str):
                yield self._from_path(key, value, row[where["caption"]], where["file"])
            elif value:
                yield RawRow(key, bytes(value), row[where["caption"]])
            else:
                yield RawRow(key, None, row[where["caption"]], "no_image", "the cell is empty")

    @staticmethod
    def _from_path(key: str, path: str, caption: str, file: str) -> RawRow:
        uri = path if storage.is_remote(path) or path.startswith("/") else storage.join(posixpath.dirname(file), path)
        return read_row(key, uri, caption)


def _open_parquet(stream: Any, uri: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(stream)
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{uri}: not a readable parquet file ({str(error).splitlines()[0][:120]})") from error


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
    kind = next(name for name, cls in SOURCES.items() if isinstance(source, cls))
    return {"kind": kind, **dataclasses.asdict(source)}  # type: ignore[call-overload]


def source_from_json(data: Mapping[str, Any]) -> Source:
    given = {key: value for key, value in data.items() if key != "kind"}
    if given.get("fetch"):
        given["fetch"] = Fetch(**{**given["fetch"], "allow_private": tuple(given["fetch"]["allow_private"])})
    return SOURCES[data["kind"]](**given)
