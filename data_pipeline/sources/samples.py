"""Members of a tar become samples: which of them belong together, and what only looks like data.

By WebDataset's rule a name's first dot begins the suffix: 0001.jpg, 0001.txt and 0001.seg.png are one sample. Names
with dots of their own (track.00.jpg, 22.05.png) break it; for them the last dot before a known suffix decides.
"""

import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from data_pipeline.sources.source import IMAGE_SUFFIXES, TEXT_SUFFIXES, is_system_file
from data_pipeline.sources.tar import Gap, Member

VOLUME_LABEL = b"V"  # of the whole archive, in GNU tar
_KNOWN = (*IMAGE_SUFFIXES, *TEXT_SUFFIXES, "json")
# A group whose names have dots of their own could be the whole tar: beyond this it is cut at the last dots.
_LARGEST_GROUP, _LARGEST_GROUP_BYTES = 64, 256 * 2**20


@dataclass(frozen=True)
class Sample:
    """Parts of one sample by suffix (lower case). `damage` says why they are not to be trusted."""

    key: str
    archive: int
    parts: dict[str, bytes]
    damage: str = ""


@dataclass(frozen=True)
class SystemFile:
    """A member that a desktop system adds beside the user's files."""

    name: str


@dataclass
class _Group:
    """Neighbours whose names agree up to their first dot."""

    key: tuple[int, str]
    members: list[tuple[str, Member]] = field(default_factory=list)
    num_bytes: int = 0

    def add(self, suffix: str, member: Member) -> None:
        self.members.append((suffix, member))
        self.num_bytes += len(member.data or b"")


def group_members(items: Iterable[Member | Gap]) -> Iterator[Sample | Member | Gap | SystemFile]:
    """Samples in the order of the tar. Gaps, files of desktop systems and members of no sample pass unchanged."""
    group = _Group((0, ""))
    for item in items:
        if isinstance(item, Gap) or item.info.isdir() or item.info.type == VOLUME_LABEL:
            if isinstance(item, Gap):
                yield from _split(group, cut=item.cut)
                group = _Group((0, ""))
                yield item
            continue
        name = item.info.name.removeprefix("./")
        if is_system_file(name):
            yield SystemFile(name)
            continue
        if item.data is None or name.startswith("/") or ".." in name.split("/"):
            yield item
            continue
        folder, file = posixpath.split(name)
        stem, _, suffix = file.partition(".")
        key = item.archive, posixpath.join(folder, stem)
        full = len(group.members) >= _LARGEST_GROUP or group.num_bytes > _LARGEST_GROUP_BYTES
        # a member that is there already begins another sample of the same key: a duplicate to be counted
        if group.members and (key != group.key or full or any(suffix.lower() == had for had, _ in group.members)):
            yield from _split(group)
            group = _Group(key)
        group.key = key
        group.add(suffix.lower(), item)
    yield from _split(group)


def _split(group: _Group, *, cut: bool = False) -> Iterator[Sample]:
    """One sample, or several where names have dots of their own and each part has an image or a text of its own.

    `cut`: the file breaks off behind the group, so that an image without its caption may have lost it there.
    """
    archive, stem = group.key
    by_stem: dict[str, list[tuple[str, Member]]] = {}
    for suffix, member in group.members:
        more, last = _split_last(suffix)
        by_stem.setdefault(more, []).append((last, member))
    plain = by_stem.pop("", [])
    extra: list[tuple[str, Member]] = []
    own: list[tuple[str, list[tuple[str, Member]]]] = []
    has_image = any(suffix in IMAGE_SUFFIXES for suffix, _ in plain)
    for more, parts in by_stem.items():
        suffixes = {suffix for suffix, _ in parts}
        image = any(suffix in IMAGE_SUFFIXES for suffix in suffixes)
        text = bool(suffixes & {*TEXT_SUFFIXES, "json"})
        if image and (text or not has_image):
            own.append((more, parts))
        else:
            extra += [(f"{more}.{suffix}", member) for suffix, member in parts]
    if plain or extra:
        yield _make_sample(stem, archive, [*plain, *extra], cut=cut)
    for more, parts in own:
        yield _make_sample(f"{stem}.{more}", archive, parts, cut=cut)


def _split_last(suffix: str) -> tuple[str, str]:
    """ "v2.jpg" is ("v2", "jpg"), "jpg.txt" ("", "txt"): a caption that is named after its image."""
    more, _, last = suffix.rpartition(".")
    if last not in _KNOWN:
        return "", suffix
    named_after = more.rpartition(".")
    return (named_after[0] if named_after[2] in IMAGE_SUFFIXES else more), last


def _make_sample(key: str, archive: int, parts: list[tuple[str, Member]], *, cut: bool) -> Sample:
    found: dict[str, bytes] = {}
    for suffix, member in parts:  # a.txt and a.jpg.txt are both texts of a
        free = (suffix, *(f"{suffix}#{number}" for number in range(2, 2 + len(parts))))
        found[next(name for name in free if name not in found)] = member.data or b""
    # what no row reads may end in zeros: a mask of raw bytes
    read = [member for suffix, member in parts if suffix in _KNOWN]
    damage = next((f"{member.info.name}: {member.damage}" for member in read if member.damage), "")
    if cut and not damage and not found.keys() & {*TEXT_SUFFIXES, "json"}:
        damage = "the file breaks off before a caption"
    return Sample(key, archive, found, damage)
