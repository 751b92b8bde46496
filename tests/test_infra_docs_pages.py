"""What the documentation says of the code stays true: paths, registries, error texts, layouts, figures, widths."""

import ast
import importlib.metadata
import json
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import few_step_plans
import pytest
import yaml
from markdown_pages import CURRENT, PAGES, ROOT, name_of, prose, table_rows
from recipes_page import PAGE, build_page

from data_pipeline.sources.registry import SOURCES

DOCS = ROOT / "infra" / "docs"
PACKAGES = ("model", "data_pipeline", "trainer", "eval", "infra")
TOP = (*PACKAGES, "tests", ".github", ".ci")
# Files that a command wrote name what was there at that time.
WRITTEN = re.compile(
    r"infra/docs/runs/.*/(report|study|isoflop|autoencoder)\.md|.*/checkpoints/\w+/README\.md|.*LICENSE\.md"
)
PLACEHOLDER = re.compile(r"\b[A-Z]{2,}\b(?!\.md)|[*<>{}$]|\.\.\.|NNN")


def by_hand(pages: list[Path]) -> list[Path]:
    return [page for page in pages if not WRITTEN.fullmatch(name_of(page))]


@pytest.mark.parametrize("page", [page for page in PAGES if "LICENSE" not in page.name], ids=name_of)
def test_lines_fit_120_columns(page):
    """Outside of tables, images and addresses of links."""
    long = [
        f"{page.name}:{number}: {len(line)} columns"
        for number, line in prose(page.read_text())
        if len(re.sub(r"\]\([^)]*\)", "]", line)) > 120
    ]
    assert not long, "\n".join(long)


def paths_in(page: Path) -> Iterator[str]:
    """Names of source files and folders in backticks."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", text):
        for word in code.split():
            word = word.split("::")[0].rstrip(",;:")
            if PLACEHOLDER.search(word) or word.startswith(("-", "http", "/", "~", "s3:")):
                continue
            if (word.split("/")[0] in TOP and "/" in word) or re.fullmatch(r"[\w./-]+\.(py|sh|j2|js|svg)", word):
                yield word


@pytest.mark.parametrize("page", by_hand(CURRENT), ids=name_of)
def test_every_path_named_exists(page):
    package = ROOT / name_of(page).split("/")[0]
    roots = [ROOT, page.parent, package, DOCS]
    missing = [
        word
        for word in paths_in(page)
        if not any((root / word).exists() for root in roots) and ("/" in word or not list(package.rglob(word)))
    ]
    assert not missing, f"{name_of(page)} names {missing}"


def registry_of(path: Path, name: str) -> ast.Dict | None:
    """The dictionary literal that `name` is at the top of that file, bare or behind MappingProxyType."""
    for node in ast.parse(path.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value = node.value
            if isinstance(value, ast.Call) and len(value.args) == 1:
                value = value.args[0]
            return value if isinstance(value, ast.Dict) else None
    return None


ADDITIONS = table_rows((DOCS / "where_to_add.md").read_text(), "to add")


def test_the_table_of_additions_is_there():
    assert len(ADDITIONS) >= 8


@pytest.mark.parametrize("row", ADDITIONS, ids=lambda row: row[0])
def test_where_to_add(row):
    """Paths are tested above; here: the registry is a dictionary literal in the file that the table names."""
    found = re.fullmatch(r"`(\w+)` in `([\w./]+)`", row[2])
    assert found, row[2]
    registry = registry_of(ROOT / found[2], found[1])
    assert registry is not None, f"{found[1]} is no dictionary literal in {found[2]}"
    assert registry.keys


def flattened(node: ast.AST) -> str | None:
    """A string, with \\0 for what an f-string fills in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
    return None


@cache
def texts_of_the_code() -> str:
    found = [(ROOT / "Makefile").read_text().replace("$(PYTHON)", "\0")]
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            found += filter(None, map(flattened, ast.walk(ast.parse(path.read_text()))))
    return "\n\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        quoted
        for row in table_rows((DOCS / "troubleshooting.md").read_text(), "you see")
        for quoted in re.findall(r"`([^`]+)`", row[0])
    ],
)
def test_troubleshooting_quotes_texts_of_the_code(text):
    """`...` on the page stands for what the message fills in."""
    pattern = r"[^\n]*?".join(re.escape(part) for part in text.split("..."))
    assert re.search(pattern, texts_of_the_code()), text


def test_every_source_layout_has_its_section():
    headings = re.findall(r"^### `(\w+):`", (DOCS / "own_data.md").read_text(), re.MULTILINE)
    assert headings == list(SOURCES)


def test_statuses_of_rows_are_those_of_the_code():
    rows = table_rows((DOCS / "own_data.md").read_text(), "status")
    told = {word for row in rows for word in re.findall(r"`(\w+)`", row[0])}
    code = "\n".join(path.read_text() for path in (ROOT / "data_pipeline").rglob("*.py"))
    assert not [word for word in told if f'"{word}"' not in code]


def test_the_front_page_tells_the_committed_prediction():
    folder = DOCS / "runs" / "world_prediction"
    said = json.loads((folder / "prediction.json").read_text())["value"]
    became = json.loads((folder / "report.json").read_text())["losses"]["world-d5"][-1]["value"]
    front = " ".join((ROOT / "README.md").read_text().split())
    assert f"{said:.3f} for depth 5" in front
    assert f"reached {became:.3f}" in front


def test_the_front_page_keeps_its_commands():
    """.ci/run calls what the README tells people to call."""
    front, landing = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^    make demo\b", front, re.MULTILINE)
    assert re.search(r"^    make test\b", front, re.MULTILINE)
    assert re.search(r"^make test$", landing, re.MULTILINE)
    assert re.search(r"^test: .*\bdocs\b", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_one_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert importlib.metadata.version("beeline") == version, "run make setup"


@pytest.mark.parametrize("package", PACKAGES)
def test_the_packages_are_typed(package):
    assert (ROOT / package / "py.typed").exists()


@pytest.mark.parametrize("form", sorted((ROOT / ".github").rglob("*.yml")), ids=name_of)
def test_forms_and_workflows_are_yaml(form):
    read = yaml.safe_load(form.read_text())
    if form.parent.name == "ISSUE_TEMPLATE" and form.stem != "config":
        assert {"name", "description", "body"} <= set(read)
    if form.parent.name == "workflows":
        assert any(step.get("run") == ".ci/run" for job in read["jobs"].values() for step in job["steps"])


def test_the_page_of_recipes_is_the_recipes_own():
    assert PAGE.read_text() == build_page(), "run python tests/recipes_page.py"


@pytest.mark.slow
def test_the_page_of_few_step_plans_is_the_planner_s(tmp_path):
    assert few_step_plans.PAGE.read_text() == few_step_plans.build_page(few_step_plans.count_lpips(tmp_path))


def test_the_glossary_is_in_order_and_its_terms_are_used():
    terms = [row[0] for row in table_rows((DOCS / "glossary.md").read_text(), "term")]
    assert terms == sorted(terms, key=lambda term: term.lower().removeprefix("the "))
    pages = " ".join(page.read_text().lower() for page in CURRENT if page.name != "glossary.md")
    assert not [term for term in terms if term.lower().split(",")[0].removeprefix("the ") not in pages]
