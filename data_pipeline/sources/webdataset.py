"""WebDataset tars, as img2dataset writes them: KEY.jpg, KEY.txt and, if there is one, KEY.json with `caption`."""

import json
import posixpath
import tarfile
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from data_pipeline.formats.parquet_io import read_table
from data_pipeline.formats.schema import fingerprint
from data_pipeline.sources.source import (
    IMAGE_SUFFIXES,
    MAX_IMAGE_BYTES,
    TEXT_SUFFIXES,
    RawRow,
    SourceOptions,
    SourceUnit,
    list_etags,
    list_existing,
    split_from_path,
    stamp_file,
)
from infra import storage
from infra.errors import MissingError, UserError


@dataclass(frozen=True)
class WebDatasetSource:
    """WebDataset tars: KEY.jpg, KEY.txt and, if there, KEY.json with `caption`.

    img2dataset writes such, and names the downloads that failed only in a table beside each tar (NNNNN.parquet).
    """

    uri: str
    options: SourceOptions = SourceOptions()  # noqa: RUF009 - frozen

    def list_units(self) -> list[SourceUnit]:
        if "{" in self.uri:
            import braceexpand

            tars = list(braceexpand.braceexpand(self.uri))
            missing = [tar for tar in tars if not storage.exists(tar)]
            if missing:
                raise MissingError(f"{missing[0]}: no such file ({len(missing)} of {len(tars)} of {self.uri} missing)")
            root = posixpath.commonpath([posixpath.dirname(tar) for tar in tars]) if len(tars) > 1 else ""
            etags: Mapping[str, str] = {}
        else:
            tars, root = list_existing(self.uri, (".tar", ".tar.gz", ".tgz"), "tars"), self.uri
            etags = list_etags(self.uri)
        there = {uri for folder in {posixpath.dirname(tar) for tar in tars} for uri in _list_tables(folder)}
        units = []
        for tar in dict.fromkeys(tars):  # a shard listed twice is read once
            relative = tar.removeprefix(root.rstrip("/") + "/") if root else posixpath.basename(tar)
            stem = posixpath.basename(tar).split(".")[0]
            split = split_from_path(relative)
            label = f"{split or 'all'}-{stem[-40:]}-{fingerprint([relative, stamp_file(tar, etags)])[:10]}"
            table = posixpath.join(posixpath.dirname(tar), f"{stem}.parquet")
            # not part of the label: img2dataset writes both at once, and roots made before tables were read stay whole
            units.append(SourceUnit(label, split, {"tar": tar} | ({"table": table} if table in there else {})))
        return units

    def read_rows(self, unit: SourceUnit) -> Iterator[RawRow]:
        uri = unit.where["tar"]
        seen: set[str] = set()
        whole = True
        for row in self._tar_rows(uri):
            seen.add(row.key)
            whole = whole and row.status != "truncated_tar"
            yield row
        # of a tar that breaks off nobody knows which rows would have followed
        if whole and "table" in unit.where:
            yield from _read_failed_downloads(unit.where["table"], seen)

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
                    problem = _check_member(member)
                    if problem:
                        yield RawRow(member.name[:200], None, None, "bad_name", f"{problem} in {uri}")
                        continue
                    folder, name = posixpath.split(member.name.removeprefix("./"))
                    stem, _, suffix = name.partition(".")
                    # a member that is there already begins another row of the same key: a duplicate to be counted
                    if members and (key != posixpath.join(folder, stem) or suffix.lower() in members):
                        yield _make_row(key, members)
                        members = {}
                    key = posixpath.join(folder, stem)
                    if member.size > MAX_IMAGE_BYTES:
                        yield RawRow(member.name, None, None, "too_large", f"{member.size:,} bytes in {uri}")
                        continue
                    content = archive.extractfile(member)
                    members[suffix.lower()] = content.read() if content else b""
                    good += 1
                if members:
                    yield _make_row(key, members)
            if uri.endswith(".tar") and not _has_end(uri):
                # tarfile takes a file that breaks off inside a header for a complete one
                raise tarfile.ReadError("no end-of-archive mark: cut short?")
        except UserError:
            raise
        except (tarfile.TarError, EOFError, OSError) as error:
            # the entry being read when the file broke off is not trusted either
            reason = f"{uri}: readable up to member {good}, then: {str(error) or type(error).__name__}"
            yield RawRow(posixpath.basename(uri), None, None, "truncated_tar", reason)


def _list_tables(folder: str) -> list[str]:
    found = storage.list_files(folder or ".", suffix=".parquet", recursive=False)
    return [posixpath.join(folder, posixpath.basename(uri)) for uri in found]


def _read_failed_downloads(uri: str, seen: AbstractSet[str]) -> Iterator[RawRow]:
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


def _check_member(member: tarfile.TarInfo) -> str:
    if not member.isfile():
        return "a link or device"
    parts = member.name.split("/")
    if member.name.startswith("/") or ".." in parts:
        return "a name that leaves the folder"
    return ""


def _make_row(key: str, members: Mapping[str, bytes]) -> RawRow:
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
