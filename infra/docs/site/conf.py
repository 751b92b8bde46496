"""Sphinx settings of the documentation site: `make docs` builds it into build/docs, warnings are errors.

The source folder is the root of the repository, so that a relative link in any Markdown page means the same file
here as it does in an editor or on a code host. Links between pages and to files are checked, others only listed.
"""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent.parent
sys.path.insert(0, str(Path(__file__).parent))

from docutils import nodes  # noqa: E402
from reference import write_pages  # noqa: E402

project = "beeline"
release = version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
copyright = "the authors of beeline; Apache-2.0"

extensions = ["myst_parser", "sphinx_copybutton"]
root_doc = "infra/docs/index"
include_patterns = [
    "*.md",
    "*/README.md",
    "*/DECISIONS.md",
    ".github/CONTRIBUTING.md",
    ".github/SECURITY.md",
    "data_pipeline/world/README.md",
    "eval/service/README.md",
    "infra/docs/**.md",
    "infra/docs/api/*.rst",
]
exclude_patterns = [".venv", "build", "work-*", "runs", "data", "own", "report", "infra/docs/site"]
templates_path = ["templates"]
html_additional_pages = {"index": "redirect.html"}
html_theme = "furo"
html_title = f"beeline {release}"
html_show_sourcelink = False
html_copy_source = False
toc_object_entries = False  # furo copies every entry into every page: minutes with 2,000 names
myst_heading_anchors = 4
myst_enable_extensions = ["html_image"]  # README sizes its pictures with <img width>
suppress_warnings = ["ref.python"]  # annotations that name a class of several modules, or of a library


def list_external_links(app, exception) -> None:
    """Nothing is asked of the network here: `sphinx-build -b linkcheck` does that."""
    found = {
        (node["refuri"], docname)
        for docname in app.env.found_docs
        for node in app.env.get_doctree(docname).findall(nodes.reference)
        if node.get("refuri", "").startswith(("http://", "https://"))
    }
    lines = [f"{uri}  ({docname})" for uri, docname in sorted(found)]
    (Path(app.outdir) / "external-links.txt").write_text("\n".join(lines) + "\n")


def setup(app) -> None:
    app.connect("builder-inited", lambda app: write_pages(ROOT, ROOT / "infra/docs/api"))
    app.connect("build-finished", list_external_links)
