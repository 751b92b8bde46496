"""Reads tars as people really have them: joined, compressed under any name, padded, cut short, with holes.

`tarfile` reads headers and members, but passes over some damage without an error. This module finds all damage and goes
on behind it. Every byte of a file belongs to a `Member`, to a `Gap`, or to the padding that the format asks for.
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
_MARK_AT = 257  # offset of the magic "ustar" in a header
# Magic numbers of formats that are not unpacked here.
_FOREIGN = {b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip", b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!": "rar"}


@dataclass(frozen=True)
class Member:
    """A member of an archive: a regular file, a link, a folder. `offset`: of its header, in bytes.

    `archive`: the number (from 0) of its archive among those that are joined in one file. `data`: the file's bytes, for
    a hard link those of its target; None for other kinds, for a file above the caller's limit, and for a link whose
    target cannot be read again. `damage`: why the data is not to be trusted; "" if it is.
    """

    info: tarfile.TarInfo
    offset: int
    archive: int
    data: bytes | None
    damage: str = ""


@dataclass(frozen=True)
class Gap:
    """`length` bytes from `offset` on that belong to no member. `cut`: the file is incomplete; otherwise it holds other
    data too."""

    offset: int
    length: int
    reason: str
    cut: bool = False

    def join(self, other: "Gap") -> "Gap":
        """One gap from the start of this one to the end of `other`, with both reasons."""
        length = other.offset + other.length - self.offset
        return Gap(self.offset, length, f"{self.reason}; {other.reason}", self.cut or other.cut)


def read_tar(file: BinaryIO, *, max_bytes: int) -> Iterator[Member | Gap]:
    """Members and gaps in the order of their offsets (in the unpacked bytes, where the file is compressed).

    Data of members above `max_bytes` is not read. Damage of the file gives a `Gap`. A UserError of the storage behind
    `file` is raised.
    """
    gap: Gap | None = None
    for item in _read_archives(Unpacked(file), max_bytes):
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


def _read_archives(stream: "Unpacked", max_bytes: int) -> Iterator[Member | Gap]:
    """As `read_tar`, but with neighbouring gaps apart: read an archive, look for the next header behind it, repeat."""
    at, archive = 0, 0
    while True:
        end = yield from _read_archive(stream, at, archive, max_bytes=max_bytes)
        broken = end == at and _is_header(stream.read_at(at, BLOCK))  # the search must not find this header again
        following = _find_header(stream, end, skip=BLOCK if broken else 0)
        yield from following.list_gaps(ended=end > 0)
        if following.header is None:
            if stream.error:
                yield Gap(stream.size_read, stream.lost, stream.error, cut=True)
            elif not stream.size_read:
                yield Gap(0, 0, "an empty file: a download that never began?", cut=True)
            return
        at, archive = following.header, archive + 1


def _read_archive(stream: "Unpacked", start: int, number: int, *, max_bytes: int) -> Generator[Member, None, int]:
    """Yields the members of the archive that begins at `start`; returns the offset behind the last whole one. `number`:
    of the archive in the file, from 0."""
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
    """Why data that ends at offset `stop` is not to be trusted: its end is zeros, and only zeros follow, to the end of
    the file or for more bytes than padding takes. "" if it is to be trusted."""
    zeros = count_hole(data or b"")
    if not zeros or any(stream.read_at(stop, MAX_PADDING + BLOCK)):
        return ""
    return f"its last {zeros:,} bytes are zeros, and so is what follows: an unfinished or preallocated file?"


@dataclass(frozen=True)
class _Trailer:
    """What lies behind an archive that ends at offset `at`: `zeros` bytes of zeros, then `other` bytes that are no
    header, then at offset `header` another archive. `header` is None at the end of the file. `kind`: a known format of
    the other bytes, in words."""

    at: int
    zeros: int
    other: int
    header: int | None
    kind: str = ""

    def list_gaps(self, *, ended: bool) -> Iterator[Gap]:
        """The gaps behind an archive. `ended`: an archive came before, so a run of zeros may be its end mark and
        padding."""
        last = self.header is None
        if self.zeros > MAX_PADDING:
            reason = f"{self.zeros:,} bytes of zeros from byte {self.at:,} on: an unfinished or preallocated file?"
            yield Gap(self.at, self.zeros, reason, cut=True)
        elif not ended and last and not self.other and self.zeros and (self.zeros % BLOCK or self.zeros < 2 * BLOCK):
            yield Gap(self.at, self.zeros, f"{self.zeros:,} bytes of zeros are no archive: cut short?", cut=True)
        elif ended and last and not self.other and self.zeros < 2 * BLOCK:
            yield Gap(self.at, self.zeros, f"no end-of-archive mark at byte {self.at:,}: cut short?", cut=True)
        if self.other:
            content = self.kind or ("no whole member: cut short?" if last else "no part of a tar")
            reason = f"{self.other:,} bytes from byte {self.at + self.zeros:,} on are {content}"
            yield Gap(self.at + self.zeros, self.other, reason, cut=last and not self.kind)


def _find_header(stream: "Unpacked", at: int, *, skip: int) -> _Trailer:
    """Look for the next header from offset `at` + `skip` on. `skip`: bytes of a header whose archive could not be
    read."""
    start, zeros = (at + skip, 0) if skip else _skip_zeros(stream, at)
    if start is None:
        return _Trailer(at, zeros, 0, None)
    kind = _name_kind(stream.read_at(start, 8)) if not skip else ""
    position = start
    while True:
        chunk = stream.read_at(position, _CHUNK + BLOCK)
        offset = _search(chunk, aligned=(at - position) % BLOCK)
        if offset is not None:
            header = position + offset
            return _Trailer(at, zeros, header - at - zeros, header, kind)
        if len(chunk) < _CHUNK + BLOCK:
            return _Trailer(at, zeros, position + len(chunk) - at - zeros, None, kind)
        position += _CHUNK


def _name_kind(beginning: bytes) -> str:
    """What foreign bytes are, by their magic number."""
    for magic, name in _FOREIGN.items():
        if beginning.startswith(magic):
            return f"{name} data: unpack it first"
    return "compressed data: unpack it first" if find_opener(beginning) else ""


def _search(chunk: bytes, *, aligned: int) -> int | None:
    """Offset of the first whole header in a chunk; None if there is none.

    A POSIX header is found at any offset by its magic "ustar". An older header has no magic: it is found only at the
    offsets `aligned`, `aligned` + BLOCK ..., where the blocks of the archive before it would go on.
    """
    in_blocks = [
        block for block in range(aligned, len(chunk) - BLOCK + 1, BLOCK)
        if chunk[block] and _is_header(chunk[block : block + BLOCK])
    ][:1]  # fmt: skip
    mark = chunk.find(b"ustar", _MARK_AT)
    while mark >= 0 and not (in_blocks and in_blocks[0] <= mark - _MARK_AT):
        if _is_header(chunk[mark - _MARK_AT : mark - _MARK_AT + BLOCK]):
            return mark - _MARK_AT
        mark = chunk.find(b"ustar", mark + 1)
    return in_blocks[0] if in_blocks else None


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
