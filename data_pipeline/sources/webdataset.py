"""WebDataset tars, as img2dataset writes them: KEY.jpg, KEY.txt and, if there is one, KEY.json with `caption`."""

import contextlib
import json
import posixpath
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from data_pipeline.formats.parquet_io import decode_table
from data_pipeline.formats.schema import fingerprint
from data_pipeline.sources.captions import find_caption
from data_pipeline.sources.samples import Dropping, Sample, group_members
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
from data_pipeline.sources.tar import Gap, Member, read_tar
from infra import storage
from infra.errors import MissingError
from infra.log import get_logger

log = get_logger("sources")


TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")


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
            tars, root = list_existing(self.uri, TAR_SUFFIXES, "tars"), self.uri
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
        for row in _read_tar_rows(uri, seen):
            whole = whole and row.status != "truncated_tar"
            yield row
        # of a tar that breaks off nobody knows which rows would have followed
        if whole and "table" in unit.where:
            yield from _read_failed_downloads(unit.where["table"], seen)


def _read_tar_rows(uri: str, seen: set[str]) -> Iterator[RawRow]:
    """The rows of a tar and one for each range of its bytes that is none; `seen` collects the keys of the rows."""
    told = droppings = 0
    try:
        stream = storage.open_read(uri)
    except MissingError as error:  # a link to nothing
        yield RawRow(posixpath.basename(uri), None, None, "unreadable", str(error))
        return
    with stream as file:
        for item in group_members(read_tar(file, max_bytes=MAX_IMAGE_BYTES)):
            if isinstance(item, Gap):
                told += 1
                name = posixpath.basename(uri) + (f"#{item.offset}" if told > 1 else "")
                status = "truncated_tar" if item.cut else "unreadable_bytes"
                yield RawRow(name, None, None, status, f"{uri}: {item.reason}")
            elif isinstance(item, Dropping):
                droppings += 1
            elif isinstance(item, Member):
                status, reason = _judge_member(item)
                yield RawRow(item.info.name[:200], None, None, status, f"{reason} in {uri}")
            else:
                # archives that were joined often count from zero each: the later one's rows get names of their own
                key = item.key if item.key not in seen or not item.archive else f"{item.key}#{item.archive}"
                seen.add(key)
                yield _make_row(key, item)
    if droppings:
        log.info("%s: %d members that desktop systems add (._*, __MACOSX, .DS_Store) passed over", uri, droppings)


def _list_tables(folder: str) -> list[str]:
    found = storage.list_files(folder or ".", suffix=".parquet", recursive=False)
    return [posixpath.join(folder, posixpath.basename(uri)) for uri in found]


def _read_failed_downloads(uri: str, seen: AbstractSet[str]) -> Iterator[RawRow]:
    """Rows of img2dataset's table that its tar lacks; another table that lies beside a tar has none."""
    table = decode_table(storage.read_bytes(uri), uri)
    if not {"key", "status"} <= set(table.column_names):
        return
    for row in table.to_pylist():
        if str(row["key"]) not in seen:
            reason = str(row.get("error_message") or row["status"] or "in the table, not in the tar")
            info = {"url": row["url"]} if row.get("url") else {}
            yield RawRow(str(row["key"]), None, row.get("caption"), "no_image", reason, info)


def _judge_member(member: Member) -> tuple[str, str]:
    """Status and reason of a member that cannot be part of a row."""
    if not member.info.isfile():
        return "bad_name", "a link or device"
    if member.data is None:
        return "too_large", f"{member.info.size:,} bytes"
    return "bad_name", "a name that leaves the folder"


def _make_row(key: str, sample: Sample) -> RawRow:
    parts, info = sample.parts, {}
    if "json" in parts:
        with contextlib.suppress(ValueError):
            loaded = json.loads(parts["json"])
            info = loaded if isinstance(loaded, dict) else {}
    image = next((parts[s] for s in IMAGE_SUFFIXES if s in parts), None)
    text: Any = next((parts[s] for s in TEXT_SUFFIXES if s in parts), find_caption(info))
    if sample.doubtful:
        return RawRow(key, None, text, "truncated_tar", sample.doubtful, info)
    if image is None:
        reason = str(info.get("error_message") or f"only {', '.join(sorted(parts)) or 'nothing'}")
        return RawRow(key, None, text, "no_image", reason, info)
    return RawRow(key, image, text, info=info)
