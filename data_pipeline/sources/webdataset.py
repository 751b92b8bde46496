"""WebDataset tars, as img2dataset writes them: KEY.jpg, KEY.txt and, if there is one, KEY.json with `caption`."""

import posixpath
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from data_pipeline.formats.parquet_io import decode_table
from data_pipeline.formats.schema import fingerprint
from data_pipeline.sources.captions import parse_fields
from data_pipeline.sources.samples import VOLUME_LABEL, Sample, SystemFile, group_members
from data_pipeline.sources.seen import DROPPING, FOLDER, LABEL, Seen, check_members, count_file
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
from infra.errors import MissingError, UnavailableError, UserError
from infra.log import get_logger

log = get_logger("sources")


TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")


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
        tables = {uri for folder in {posixpath.dirname(tar) for tar in tars} for uri in _list_tables(folder)}
        units = []
        for tar in dict.fromkeys(tars):  # a shard listed twice is read once
            relative = tar.removeprefix(root.rstrip("/") + "/") if root else posixpath.basename(tar)
            stem = posixpath.basename(tar).split(".")[0]
            split = split_from_path(relative)
            column = self.options.caption_column
            content = [relative, stamp_file(tar, etags), *([column] if column else [])]
            label = f"{split or 'all'}-{stem[-40:]}-{fingerprint(content)[:10]}"
            table = posixpath.join(posixpath.dirname(tar), f"{stem}.parquet")
            # not part of the label: img2dataset writes both at once, and roots made before tables were read stay whole
            units.append(SourceUnit(label, split, {"tar": tar} | ({"table": table} if table in tables else {})))
        return units

    def read_rows(self, unit: SourceUnit) -> Iterator[RawRow]:
        uri = unit.where["tar"]
        keys: set[str] = set()
        seen, complete = unit.seen, True
        for row in _read_tar_rows(uri, keys, seen, field=self.options.caption_column):
            complete = complete and row.status != "truncated_tar"
            yield row
        # of a tar that breaks off nobody knows which rows would have followed
        if complete and "table" in unit.where:
            yield from _read_failed_downloads(unit.where["table"], keys)


def _count_members(items: Iterator[Member | Gap], seen: Seen) -> Iterator[Member | Gap]:
    """As they come out of the tar, before anything is made of them."""
    for item in items:
        if isinstance(item, Gap):
            seen["unreadable ranges"] += 1
            seen["unreadable bytes"] += item.length
        elif item.info.isdir():
            seen["member folder"] += 1
            seen[FOLDER] += 1
        elif item.info.type == VOLUME_LABEL:
            seen["member label"] += 1
            seen[LABEL] += 1
        else:
            count_file(seen, item.info.name)
        yield item


def _read_tar_rows(uri: str, keys: set[str], seen: Seen, *, field: str) -> Iterator[RawRow]:
    """The rows of a tar and one for each range of its bytes that is none; `keys` collects the keys of the rows."""
    num_gaps = used = 0
    try:
        stream = storage.open_read(uri)
    except MissingError as error:  # a link to nothing
        yield RawRow(posixpath.basename(uri), None, None, "unreadable", str(error))
        return
    with stream as file:
        for item in group_members(_count_members(read_tar(file, max_bytes=MAX_IMAGE_BYTES), seen)):
            if isinstance(item, Gap):
                num_gaps += 1
                name = posixpath.basename(uri) + (f"#{item.offset}" if num_gaps > 1 else "")
                status = "truncated_tar" if item.cut else "unreadable_bytes"
                yield RawRow(name, None, None, status, f"{uri}: {item.reason}")
            elif isinstance(item, SystemFile):
                seen[DROPPING] += 1
            elif isinstance(item, Member):
                used += 1
                status, reason = _judge_member(item)
                yield RawRow(item.info.name[:200], None, None, status, f"{reason} in {uri}")
            else:
                # archives that were joined often count from zero each: the later one's rows get names of their own
                key = item.key if item.key not in keys or not item.archive else f"{item.key}#{item.archive}"
                apart = item.key in keys and key == item.key
                keys.add(key)
                used += len(item.parts)
                seen.update(f"unread .{suffix}" for suffix in item.parts.keys() - _list_read(item.parts))
                yield _make_row(key, item, field, apart=apart)
    check_members(seen, used, uri)
    if seen[DROPPING]:
        log.info("%s: %d members that desktop systems add (._*, __MACOSX, .DS_Store) passed over", uri, seen[DROPPING])


def _list_tables(folder: str) -> list[str]:
    found = storage.list_files(folder or ".", suffix=".parquet", recursive=False)
    return [posixpath.join(folder, posixpath.basename(uri)) for uri in found]


def _read_failed_downloads(uri: str, keys: AbstractSet[str]) -> Iterator[RawRow]:
    """Rows of img2dataset's table that its tar lacks; another table that lies beside a tar has none."""
    try:
        table = decode_table(storage.read_bytes(uri), uri)
    except UnavailableError:
        raise
    except UserError as error:  # the tar's own rows count all the same
        yield RawRow(posixpath.basename(uri), None, None, "unreadable", str(error))
        return
    if not {"key", "status"} <= set(table.column_names):
        return
    for row in table.to_pylist():
        if str(row["key"]) not in keys:
            reason = str(row.get("error_message") or row["status"] or "in the table, not in the tar")
            info = {"url": row["url"]} if row.get("url") else {}
            yield RawRow(str(row["key"]), None, row.get("caption"), "no_image", reason, info)


def _judge_member(member: Member) -> tuple[str, str]:
    """Status and reason of a member that cannot be part of a row."""
    if not member.info.isfile():
        if member.info.issym():
            return "bad_name", "a symbolic link: `tar -h` writes what it points to"
        return "bad_name", "a hard link to no member before it" if member.info.islnk() else "a device"
    if member.data is None:
        return "too_large", f"{member.info.size:,} bytes"
    return "bad_name", "a name that leaves the folder"


def _make_row(key: str, sample: Sample, field: str, *, apart: bool) -> RawRow:
    parts = sample.parts
    info, in_json = parse_fields(parts["json"], field) if "json" in parts else ({}, None)
    image, written = (_find_part(parts, suffixes) for suffixes in (IMAGE_SUFFIXES, TEXT_SUFFIXES))
    blank = not written or ("json" in parts and not parts[written].strip())
    text: Any = in_json if blank else parts[written]
    if sample.damage:
        return RawRow(key, None, text, "truncated_tar", sample.damage, info)
    if not image:
        reason = str(info.get("error_message") or f"only {', '.join(sorted(parts)) or 'nothing'}")
        reason += ", apart from other files of this name: tar them with --sort=name" if apart else ""
        return RawRow(key, None, text, "no_image", reason, info)
    return RawRow(key, parts[image], text, info=info)


def _find_part(parts: Mapping[str, bytes], suffixes: tuple[str, ...]) -> str:
    return next((suffix for suffix in suffixes if suffix in parts), "")


def _list_read(parts: Mapping[str, bytes]) -> set[str]:
    """Suffixes of what a row is made of: the first image, the first text, the fields."""
    return {_find_part(parts, IMAGE_SUFFIXES), _find_part(parts, TEXT_SUFFIXES), "json"}
