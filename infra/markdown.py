"""Markdown that commands write: prose of at most 120 columns, and the items of its lists read back."""

import re
import textwrap

WIDTH = 120
# A word that would begin a list, a heading, a quotation or a table if it stood first in a line.
_MARKER = re.compile(r" (?=(?:[-+*=]+|#{1,6}|\d+[.)]) |[>|])")
_KEPT = ("|", "!", "#", "    ", "<")


def wrap_prose(text: str) -> str:
    """The text with lines of paragraphs and list items broken at WIDTH; tables, pictures, headings and code stay."""
    lines: list[str] = []
    fenced = False
    for line in text.split("\n"):
        fenced ^= line.startswith("```")
        if fenced or len(line) <= WIDTH or line.startswith(_KEPT):
            lines.append(line)
            continue
        wrapped = textwrap.wrap(
            _MARKER.sub("\0", line), WIDTH, subsequent_indent="  " if line.startswith("- ") else "",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
        lines += [part.replace("\0", " ") for part in wrapped]
    return "\n".join(lines)


def read_items(text: str) -> list[str]:
    """Each item of the text's lists of one level, on one line and without its dash."""
    return [" ".join(item.split()) for item in re.findall(r"^- (.+(?:\n  .+)*)", text, re.MULTILINE)]
