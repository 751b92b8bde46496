"""What a source was seen to hold, counted below its rows: members and rows can be reconciled where ingest ends.

A counter with words for keys: `member .jpg` is a file or a tar's member by suffix, `record` a line of a table;
`unread .seg.png` a member of a row that the row does not keep, `passed ...` one that belongs to no row;
`unreadable bytes` and `unreadable ranges` are what a status tells with its offset.
"""

import posixpath
from collections import Counter
from collections.abc import Mapping

Seen = Counter[str]
DROPPING, FOLDER, BLANK = "passed member of a desktop system", "passed folder", "passed blank line"
LABEL = "passed label of a tar"


def count_file(seen: Seen, name: str) -> None:
    """A file or member, by the ending of its name."""
    seen[f"member {posixpath.splitext(name)[1].lower() or 'without suffix'}"] += 1


def sum_kind(seen: Mapping[str, int], kind: str) -> int:
    """All counts of a kind: member, record, unread, passed."""
    return sum(count for name, count in seen.items() if name.split(" ")[0] == kind)


def check_members(seen: Seen, used: int, where: str) -> None:
    """Every member is part of a row or passed over: else members were lost, which is a mistake of this program."""
    members, passed = sum_kind(seen, "member"), sum_kind(seen, "passed")
    if members != used + passed:
        raise AssertionError(f"{where}: {members} members, but {used} in rows and {passed} passed over")


def format_seen(seen: Mapping[str, int], statuses: Mapping[str, int]) -> list[str]:
    """Rows by status and unreadable bytes; members by suffix and what of them no row keeps. `statuses` are ingest's."""
    total, ok = sum(statuses.values()), statuses.get("ok", 0)
    aside = list_counts({name: n for name, n in statuses.items() if name != "ok"}, most=8)
    rows = f"{total:,} rows read: {ok:,} ok" + (f", {total - ok:,} set aside ({aside})" if total > ok else "")
    if ranges := seen.get("unreadable ranges", 0):
        rows += f"; {seen['unreadable bytes']:,} bytes in {ranges:,} ranges are unreadable"
    found = [rows]
    if members := sum_kind(seen, "member"):
        found.append(f"{members:,} files or members seen: {list_counts(_select_kind(seen, 'member'), most=8)}")
    if records := seen.get("record", 0):
        found.append(f"{records:,} records of tables")
    rest = [(name, _select_kind(seen, kind)) for kind, name in (("passed", "passed over"), ("unread", "not read"))]
    listed = "; ".join(f"{name} {list_counts(counts, most=8)}" for name, counts in rest if counts)
    return [*found, listed] if listed else found


def _select_kind(seen: Mapping[str, int], kind: str) -> dict[str, int]:
    split = [(*name.partition(" "), count) for name, count in seen.items()]
    return {rest: count for first, _, rest, count in split if first == kind and rest}


def list_counts(counts: Mapping[str, int], *, most: int = 7) -> str:
    """`12 .png, 3 .txt`: the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = f", and {len(ordered) - most} kinds more" if len(ordered) > most else ""
    return ", ".join(f"{count:,} {name}" for name, count in ordered[:most]) + more
