"""Tars as people really have them: joined, compressed under any name, padded, cut short, with holes.

`tarfile` reads headers and members; what it would pass over without a word is found here. Every byte of a file becomes
a `Member`, a `Gap` that says where and how long it is, or is the padding that the format asks for.
"""

import tarfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from data_pipeline.images import count_hole
from data_pipeline.sources.unpacked import Unpacked, find_opener
from infra.errors import UserError

BLOCK = tarfile.BLOCKSIZE
# Two zero blocks end an archive, and writers fill its last record of 20 blocks (the default of GNU tar and Python). A
# longer run of zeros is a hole: a file that was allocated in advance, or a download that never finished.
MAX_PADDING = 2 * BLOCK + tarfile.RECORDSIZE - BLOCK
_CHUNK = 2**20
_REMEMBERED = 200_000  # members of an archive that hard links may name
_MARK_AT = 257  # of "ustar" in a header
_FOREIGN = {b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip", b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!": "rar"}


@dataclass(frozen=True)
class Member:
    """A regular file of the archive; `archive` counts the archives that are joined in one file, from 0.

    `data` is None for what is no file or exceeds the caller's limit, and that of its target for a hard link; `damage`
    says why the data is not to be trusted.
    """

    info: tarfile.TarInfo
    offset: int
    archive: int
    data: bytes | None
    damage: str = ""


@dataclass(frozen=True)
class Gap:
    """Bytes that belong to no member. `cut` is true where the file is incomplete rather than mixed with other data."""

    offset: int
    length: int
    reason: str
    cut: bool = False

    def join(self, other: "Gap") -> "Gap":
        """One gap for two neighbours."""
        length = other.offset + other.length - self.offset
        return Gap(self.offset, length, f"{self.reason}; {other.reason}", self.cut or other.cut)


def read_tar(file: BinaryIO, *, max_bytes: int) -> Iterator[Member | Gap]:
    """Members and gaps in the order of their offsets (in the unpacked bytes, where the file is compressed).

    Data of members above `max_bytes` is not read. Errors of the file end in a `Gap`; those of a store are raised.
    """
    gap: Gap | None = None
    for item in _read_parts(Unpacked(file), max_bytes):
        if isinstance(item, Gap) and gap is not None:
            gap = gap.join(item)
        elif isinstance(item, Gap):
            gap = item
        else:
            if gap is not None:
                yield gap
            gap = None
            yield item
    if gap is not None:
        yield gap


def _read_parts(stream: "Unpacked", max_bytes: int) -> Iterator[Member | Gap]:
    at, archive = 0, 0
    while True:
        end = yield from _read_archive(stream, at, archive, max_bytes=max_bytes)
        broken = end == at and _is_header(stream.read_at(at, BLOCK))  # else the search would find it again
        following = _find_header(stream, end, skip=BLOCK if broken else 0)
        yield from following.gaps(ended=end > 0)
        if following.header is None:
            if stream.error:
                yield Gap(stream.size_read, stream.lost, stream.error, cut=True)
            elif not stream.size_read:
                yield Gap(0, 0, "an empty file: a download that never began?", cut=True)
            return
        at, archive = following.header, archive + 1


def _read_archive(
    stream: "Unpacked", start: int, number: int, *, max_bytes: int
) -> Generator[Member, None, int]:
    """Members of the archive that begins at `start`; returns the offset behind the last whole one."""
    end, places = start, dict[str, tuple[int, int]]()
    stream.seek(start)
    try:
        archive = tarfile.open(fileobj=cast(BinaryIO, stream), mode="r:")  # noqa: SIM115 - holds nothing of its own
        while (info := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # it would remember every header
            data = None
            if info.isfile() and info.size <= max_bytes:
                content = archive.extractfile(info)
                data = content.read() if content else b""
                if not info.issparse() and len(places) < _REMEMBERED:
                    places[info.name] = info.offset_data, info.size
            elif info.islnk() and info.linkname in places and stream.can_reach(places[info.linkname][0]):
                data = stream.read_at(*places[info.linkname])
            stop = info.offset_data + info.size
            if info.isreg() and not info.issparse() and info.size and not stream.read_at(stop - 1, 1):
                break  # its data is not all there
            damage = _describe_hole(stream, data, stop)
            end = archive.offset
            yield Member(info, info.offset, number, data, damage)
    except UserError:
        raise
    except (tarfile.TarError, EOFError, OSError, ValueError):
        pass  # `end` says how far it could be read
    return end


def _describe_hole(stream: "Unpacked", data: bytes | None, stop: int) -> str:
    """Why data that ends at `stop` is not to be trusted: its end is zeros, and so is the rest of the file or much of
    it."""
    zeros = count_hole(data or b"")
    if not zeros or any(stream.read_at(stop, MAX_PADDING + BLOCK)):
        return ""
    return f"its last {zeros:,} bytes are zeros, and so is what follows: an unfinished or preallocated file?"


@dataclass(frozen=True)
class _Following:
    """What lies behind an archive: a run of zeros, then bytes that are no header, then perhaps another archive."""

    at: int
    zeros: int
    other: int
    header: int | None
    kind: str = ""

    def gaps(self, *, ended: bool) -> Iterator[Gap]:
        """`ended`: an archive came before, so that a run of zeros may be its end mark and padding."""
        last = self.header is None
        if self.zeros > MAX_PADDING:
            reason = f"{self.zeros:,} bytes of zeros from byte {self.at:,} on: an unfinished or preallocated file?"
            yield Gap(self.at, self.zeros, reason, cut=True)
        elif ended and last and not self.other and self.zeros < 2 * BLOCK:
            yield Gap(self.at, self.zeros, f"no end-of-archive mark at byte {self.at:,}: cut short?", cut=True)
        if self.other:
            what = self.kind or ("no whole member: cut short?" if last else "no part of a tar")
            reason = f"{self.other:,} bytes from byte {self.at + self.zeros:,} on are {what}"
            yield Gap(self.at + self.zeros, self.other, reason, cut=last and not self.kind)


def _find_header(stream: "Unpacked", at: int, *, skip: int) -> _Following:
    """The next header at or behind `at` + `skip`; a header in the skipped bytes is known to lead nowhere."""
    start, zeros = (at + skip, 0) if skip else _skip_zeros(stream, at)
    if start is None:
        return _Following(at, zeros, 0, None)
    kind = _name_kind(stream.read_at(start, 8)) if not skip else ""
    position = start
    while True:
        chunk = stream.read_at(position, _CHUNK + BLOCK)
        found = _search(chunk, aligned=(at - position) % BLOCK)
        if found is not None:
            header = position + found
            return _Following(at, zeros, header - at - zeros, header, kind)
        if len(chunk) < _CHUNK + BLOCK:
            return _Following(at, zeros, position + len(chunk) - at - zeros, None, kind)
        position += _CHUNK


def _name_kind(beginning: bytes) -> str:
    """What foreign bytes are, by their magic number."""
    for magic, name in _FOREIGN.items():
        if beginning.startswith(magic):
            return f"{name} data: unpack it first"
    return "compressed data: unpack it first" if find_opener(beginning) else ""


def _search(chunk: bytes, *, aligned: int) -> int | None:
    """Offset of the first whole header in a chunk: POSIX ones by their mark, older ones in the archive's blocks."""
    found = [
        block for block in range(aligned, len(chunk) - BLOCK + 1, BLOCK)
        if chunk[block] and _is_header(chunk[block : block + BLOCK])
    ][:1]  # fmt: skip
    mark = chunk.find(b"ustar", _MARK_AT)
    while mark >= 0 and not (found and found[0] <= mark - _MARK_AT):
        if _is_header(chunk[mark - _MARK_AT : mark - _MARK_AT + BLOCK]):
            return mark - _MARK_AT
        mark = chunk.find(b"ustar", mark + 1)
    return found[0] if found else None


def _is_header(block: bytes) -> bool:
    """A block whose checksum is right (POSIX.1-1988, ustar)."""
    if len(block) < BLOCK:
        return False
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _skip_zeros(stream: "Unpacked", at: int) -> tuple[int | None, int]:
    """(offset of the first byte behind `at` that is not zero, or None, and how many zeros come before)."""
    position = at
    while chunk := stream.read_at(position, _CHUNK):
        rest = chunk.lstrip(b"\0")
        if rest:
            position += len(chunk) - len(rest)
            return position, position - at
        position += len(chunk)
    return None, position - at
