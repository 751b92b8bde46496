"""The Markdown of the repository as tests read it."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent


def tracked(*patterns: str) -> list[Path]:
    """Files under version control, or about to be; all files in a copy without git."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode:
        return sorted(path for pattern in patterns for path in ROOT.rglob(pattern) if ".venv" not in path.parts)
    return [ROOT / name for name in sorted(set(listed.stdout.split("\n"))) if name and (ROOT / name).exists()]


PAGES = tracked("*.md")
RULES = [page for page in PAGES if page.name == "DECISIONS.md"]  # a dated entry may name what is gone
CURRENT = [page for page in PAGES if page not in RULES and page.name != "CHANGELOG.md"]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(text: str) -> Iterator[tuple[int, str]]:
    """(line number, line) outside of tables, images and code blocks."""
    fenced = False
    for number, line in enumerate(text.split("\n"), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.lstrip().startswith(("|", "![", "<img", "<!--")):
            yield number, line


def table_rows(text: str, first_column: str) -> list[list[str]]:
    """Cells of every row of every table whose first heading is `first_column`."""
    rows: list[list[str]] = []
    inside = False
    for line in text.split("\n"):
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells[0] == first_column:
            inside = True
        elif inside and not set(line) <= set("|-: "):
            rows.append(cells)
    return rows
