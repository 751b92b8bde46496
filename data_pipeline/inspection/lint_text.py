"""The findings of `lint` on one screen."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence

from data_pipeline.inspection.lint import BrokenPart, LintFindings
from data_pipeline.sources.seen import format_seen, list_counts
from data_pipeline.sources.source import FoundField

WIDTH, LABEL = 118, 12
_MOST_BROKEN, _MOST_FIELDS = 6, 8


def format_findings(found: LintFindings) -> str:
    """At most 40 lines of at most 118 characters."""
    part = (
        "all of it"
        if found.whole
        else (f"a sample: the first rows of {found.units_read:,} of {found.units:,} units; --all reads everything")
    )
    blocks: list[tuple[str, Iterable[str]]] = [
        ("files", [list_counts(found.files) or "a pattern of names"]),
        ("seen", _wrap(format_seen(found.seen, found.statuses))),
        ("set aside", _format_broken(found)),
        ("fields", _format_fields(found.fields)),
        ("captions", _format_captions(found)),
        ("pictures", _format_pictures(found)),
        ("splits", [_format_splits(found.splits)]),
        *((f"run {name}", _wrap(_format_outcome(found, name))) for name in found.outcomes),
        ("", ["`run` also makes scores (nsfw, aesthetic) and near duplicates where its plan says so"]),
    ]
    lines = [_cut(found.source), f"{found.rows:,} rows, {part}", "-" * LABEL]
    for label, texts in blocks:
        lines += [_cut(f"{label if number == 0 else '':<{LABEL}}{text}") for number, text in enumerate(texts)]
    return "\n".join(lines)


def format_fields(fields: Sequence[FoundField]) -> str:
    """For a table that is refused: its columns, one a line."""
    lines = _format_fields(fields)
    return "\n".join(_cut(f"{'columns' if n == 0 else '':<{LABEL}}{line}") for n, line in enumerate(lines))


def _wrap(lines: Iterable[str]) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, WIDTH - LABEL, subsequent_indent="  ", max_lines=2)]


def _format_broken(found: LintFindings) -> list[str]:
    """Examples of each status in turn, so that a frequent one hides no other. Addresses are told below the source's."""
    root, total = found.source.partition(":")[2].rstrip("/") + "/", found.rows - found.statuses["ok"]
    by_status: dict[str, list[BrokenPart]] = {}
    for part in found.broken:
        by_status.setdefault(part.status, []).append(part)
    turns = sorted(((n, status) for status, parts in by_status.items() for n in range(len(parts))))
    shown = [by_status[status][n] for n, status in turns[:_MOST_BROKEN]]
    lines = []
    for part in shown:
        reason = part.reason.replace(root, "")
        lines.append(f"{part.status}  " + (reason if reason.startswith(part.row) else f"{part.row}: {reason}"))
    return [*lines, f"and {total - len(shown):,} more"] if total > len(shown) else lines


def _format_fields(fields: Sequence[FoundField]) -> list[str]:
    lines = []
    for one in fields[:_MOST_FIELDS]:
        rows = f", {one.rows:,} rows" if one.rows else ""
        lines.append(f"{one.name} ({one.type}{rows})" + (f": {_quote(one.example)}" if one.example else ""))
    more = len(fields) - len(lines)
    return [*lines, f"and {more} more: {', '.join(one.name for one in fields[_MOST_FIELDS:])}"] if more else lines


def _format_captions(found: LintFindings) -> list[str]:
    lines = [(f"column {found.caption_column}: " if found.caption_column else "") + list_counts(found.caption_values)]
    if found.caption_chars:
        smallest, median, largest = found.caption_chars
        lines[0] += f"; {smallest:,} to {largest:,} characters, median {median:,}"
    if found.caption_copies:
        lines.append(f"{found.caption_copies:,} rows have a caption that an earlier one has")
    return lines + [_quote(caption) for caption in found.captions]


def _format_pictures(found: LintFindings) -> list[str]:
    traits = f"; {list_counts(found.traits)}" if found.traits else ""
    lines = [list_counts(found.pictures) + traits] if found.pictures else []
    if found.widths:
        sizes = (f"{name} {a:,} to {c:,}, median {b:,}" for name, (a, b, c) in
                 (("width", found.widths), ("height", found.heights)))  # fmt: skip
        lines.append("; ".join(sizes) + f"; {found.duplicates:,} rows with the pixels of an earlier one")
    return lines or ["none that can be decoded"]


def _format_splits(splits: Mapping[str, int]) -> str:
    if set(splits) <= {"none"}:
        return "none of its own: the run holds out --val-fraction of the rows"
    return list_counts({"without a split" if name == "none" else name: count for name, count in splits.items()})


def _format_outcome(found: LintFindings, name: str) -> list[str]:
    outcome = found.outcomes[name]
    lines = [f"{outcome.kept:,} rows kept" + (f": {list_counts(outcome.buckets)}" if outcome.kept else "")]
    if outcome.set_aside:
        lines.append(f"{sum(outcome.set_aside.values()):,} set aside: {list_counts(outcome.set_aside)}")
    return lines


def _quote(text: str) -> str:
    return f'"{" ".join(text.split())}"'


def _cut(line: str) -> str:
    printable = "".join(character if character.isprintable() else "?" for character in line)
    return printable if len(printable) <= WIDTH else printable[: WIDTH - 3] + "..."
