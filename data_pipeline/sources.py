"""Where raw images come from: a folder, WebDataset tars, parquet files. A source lists units of work and reads one.

A unit's id names what it holds (path, size, time): a changed file is a new unit, an unchanged one is never redone.
"""

import dataclasses
import json
import posixpath
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.schema import fingerprint
from infra import storage
from infra.errors import MissingError, UnavailableError, UserError, nearest

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")
TEXT_SUFFIXES = ("txt", "text", "caption")
SPLITS = ("train", "val")
FOLDER_ROWS = 500
MAX_IMAGE_BYTES = 256 * 2**20


class RawRow(NamedTuple):
    """One row as found. `status` is ok or says what was wrong with the container's entry."""

    key: str
    image: bytes | None
    caption: bytes | str | None
    status: str = "ok"
    reason: str = ""
    info: Mapping[str, Any] = {}


@dataclass(frozen=True)
class SourceUnit:
    """What one ingest task reads: `where` is for the source that listed it. `split` is "" where pack shall decide."""

    id: str
    split: str
    where: Mapping[str, Any]


class Source(Protocol):
    """A kind of input."""

    def units(self) -> list[SourceUnit]: ...

    def rows(self, unit: SourceUnit) -> Iterator[RawRow]: ...


def parse_source(text: str, *, image_column: str = "", caption_column: str = "") -> Source:
    """`folder:/path`, `wds:URI` (folder or brace pattern) or `parquet:/path`."""
    kind, colon, where = text.partition(":")
    if not colon or kind not in SOURCES:
        raise UserError(
            f"source {text!r}: expected one of {', '.join(f'{k}:URI' for k in SOURCES)}{nearest(kind, SOURCES)}"
        )
    if not where:
        raise UserError(f"source {text!r} names no place: write {kind}:/path or {kind}:s3://bucket/prefix")
    if kind == "parquet":
        return ParquetSource(where, image_column, caption_column)
    return SOURCES[kind](where)


def _stamp(uri: str) -> list[object]:
    """What changes when a file changes, without reading it."""
    if storage.is_remote(uri):
        return [storage.size(uri)]
    state = storage.local_path(uri).stat()
    return [state.st_size, state.st_mtime_ns]


def _split_of(relative: str) -> str:
    """train/00000.tar belongs to train; anything else to no split."""
    first = relative.split("/", 1)[0]
    return first if first in SPLITS and "/" in relative else ""


def _existing(uri: str, suffixes: tuple[str, ...], what: str) -> list[str]:
    """Files of a folder with these endings, or the file itself; UserError when there are none."""
    found = [name for name in storage.list_files(uri) if name.lower().endswith(suffixes)]
    if not found:
        if not storage.exists(uri) and (storage.is_remote(uri) or not storage.local_path(uri).is_dir()):
            raise MissingError(f"{uri}: no such file or folder; the source must name existing {what}")
        raise UserError(f"{uri}: holds no {what} ({', '.join(suffixes[:4])}): nothing to do")
    return found


@dataclass(frozen=True)
class FolderSource:
    """Images with captions in a .txt of the same name beside them."""

    uri: str

    def units(self) -> list[SourceUnit]:
        names = _existing(self.uri, tuple(f".{s}" for s in IMAGE_SUFFIXES), "images")
        root = self.uri.rstrip("/") + "/"
        texts = {name for name in storage.list_files(self.uri) if name.endswith(".txt")}
        by_split: dict[str, list[str]] = {}
        for name in names:
            by_split.setdefault(_split_of(name.removeprefix(root)), []).append(name)
        units = []
        for split, files in by_split.items():
            for first in range(0, len(files), FOLDER_ROWS):
                rows = [self._row(name, root, texts) for name in files[first : first + FOLDER_ROWS]]
                label = f"{split or 'all'}-{first // FOLDER_ROWS:05d}-{fingerprint(rows)[:10]}"
                units.append(SourceUnit(label, split, {"rows": [(image, text) for image, text, *_ in rows]}))
        return units

    def _row(self, name: str, root: str, texts: set[str]) -> list[object]:
        text = name.rsplit(".", 1)[0] + ".txt"
        stamps = [] if storage.is_remote(name) else [_stamp(uri) for uri in (name, text) if uri == name or uri in texts]
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
            tars, root = _existing(self.uri, (".tar", ".tar.gz", ".tgz"), "tars"), self.uri
        units = []
        for tar in dict.fromkeys(tars):  # a shard listed twice is read once
            relative = tar.removeprefix(root.rstrip("/") + "/") if root else posixpath.basename(tar)
            stem = posixpath.basename(tar).split(".")[0]
            split = _split_of(relative)
            label = f"{split or 'all'}-{stem[-40:]}-{fingerprint([relative, _stamp(tar)])[:10]}"
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

    def units(self) -> list[SourceUnit]:
        units = []
        for file in _existing(self.uri, (".parquet",), "parquet files"):
            with storage.open_read(file) as stream:
                parquet = _open_parquet(stream, file)
                image, caption = self._columns(parquet.schema_arrow, file)
                for group in range(parquet.num_row_groups):
                    where = {"file": file, "group": group, "image": image, "caption": caption}
                    relative = file.removeprefix(self.uri.rstrip("/") + "/")
                    stem = posixpath.basename(file).rsplit(".", 1)[0]
                    split = _split_of(relative) or next((s for s in SPLITS if stem.startswith(f"{s}-")), "")
                    label = (
                        f"{split or 'all'}-{stem[-40:]}-{group:04d}-{fingerprint([relative, where, _stamp(file)])[:10]}"
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
            if name not in names:
                if what == "image" and not asked and "url" in [n.lower() for n in names]:
                    raise UserError(f"{file}: holds urls, not images: fetch them with img2dataset, then use wds:FOLDER")
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
            table = parquet.read_row_group(where["group"], columns=[*names, *(["key"] if has_key else [])])
        for number, row in enumerate(table.to_pylist()):
            key = str(row["key"]) if has_key else f"{where['group']:04d}-{number:06d}"
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
        try:
            return RawRow(key, storage.read_bytes(uri), caption)
        except UnavailableError:
            raise
        except UserError as error:
            return RawRow(key, None, caption, "unreadable", str(error))


def _open_parquet(stream: Any, uri: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(stream)
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{uri}: not a readable parquet file ({str(error).splitlines()[0][:120]})") from error


SOURCES: Mapping[str, Any] = {"folder": FolderSource, "wds": WdsSource, "parquet": ParquetSource}


def source_to_json(source: Source) -> dict[str, Any]:
    """So that a task can carry its source as plain data."""
    kind = next(name for name, cls in SOURCES.items() if isinstance(source, cls))
    return {"kind": kind, **dataclasses.asdict(source)}  # type: ignore[call-overload]


def source_from_json(data: Mapping[str, Any]) -> Source:
    return SOURCES[data["kind"]](**{key: value for key, value in data.items() if key != "kind"})
