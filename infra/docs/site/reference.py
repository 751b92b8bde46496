"""Writes the reference: a page per folder of the five packages, from signatures and docstrings, importing nothing.

sphinx-autoapi does the same in four CPU minutes for this tree (it infers types and writes a page per file); this
takes a few seconds. Private names (a leading underscore) are left out.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("model", "data_pipeline", "trainer", "eval", "infra")
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def write_pages(root: Path, out: Path) -> None:
    """One page per folder that holds modules, and `index.rst` that lists them; pages of former folders are removed."""
    folders = sorted({path.parent for package in PACKAGES for path in (root / package).rglob("*.py")})
    pages = {"index.rst": make_index_page([folder.relative_to(root) for folder in folders if is_package(folder)])}
    for folder in filter(is_package, folders):
        pages[name_page(folder.relative_to(root)) + ".rst"] = make_folder_page(folder, root)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.rst"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        path = out / name
        if not path.exists() or path.read_text() != text:  # an unchanged page keeps its time: Sphinx skips it
            path.write_text(text)


def is_package(folder: Path) -> bool:
    return (folder / "__init__.py").exists()


def name_page(folder: Path) -> str:
    return ".".join(folder.parts)


def make_index_page(folders: list[Path]) -> str:
    names = "\n".join(f"   {name_page(folder)}" for folder in folders)
    text = "Signatures and docstrings of all public names, a page per folder. Options of commands: ``COMMAND --help``."
    return f"{format_title('Reference', '=')}\n{text}\n\n.. toctree::\n   :maxdepth: 1\n\n{names}\n"


def make_folder_page(folder: Path, root: Path) -> str:
    name = name_page(folder.relative_to(root))
    parts = [format_title(name, "=")]
    for path in sorted(folder.glob("*.py"), key=lambda path: (path.name != "__init__.py", path.name)):
        parts += describe_module(path, root)
    return "\n".join(parts) + "\n"


def describe_module(path: Path, root: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    parts = path.relative_to(root).with_suffix("").parts
    public = [node for node in tree.body if isinstance(node, Definition) and not node.name.startswith("_")]
    if parts[-1] == "__init__":
        yield from format_prose(ast.get_docstring(tree))
        parts = parts[:-1]
        if not public:
            return
    else:
        yield format_title(path.name, "-")
    yield f".. py:module:: {'.'.join(parts)}\n"
    if path.name != "__init__.py":
        yield from format_prose(ast.get_docstring(tree))
    for node in public:
        yield from describe_definition(node)


def describe_definition(node: Definition, indent: str = "", kind: str = "function") -> Iterator[str]:
    """A function, or a class with its annotated fields, properties and documented public methods."""
    if isinstance(node, ast.ClassDef):
        bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
        yield f"{indent}.. py:class:: {node.name}{bases}\n"
        yield from format_prose(ast.get_docstring(node), indent + "   ")
        yield from describe_members(node, indent + "   ")
        return
    arguments = ast.unparse(node.args)
    if kind == "method":
        arguments = re.sub(r"^(self|cls)(, |$)", "", arguments)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if any(isinstance(mark, ast.Name) and "property" in mark.id for mark in node.decorator_list):
        yield f"{indent}.. py:property:: {node.name}\n"
    else:
        yield f"{indent}.. py:{kind}:: {node.name}({arguments}){returns}\n"
    yield from format_prose(ast.get_docstring(node), indent + "   ")


def describe_members(node: ast.ClassDef, indent: str) -> Iterator[str]:
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            if field.target.id.startswith("_"):
                continue
            yield f"{indent}.. py:attribute:: {field.target.id}"
            yield f"{indent}   :type: {ast.unparse(field.annotation)}"
            if field.value is not None and len(value := ast.unparse(field.value)) < 80:
                yield f"{indent}   :value: {value}"
            yield ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                yield from format_prose(str(after.value.value), indent + "   ")
        elif isinstance(field, Definition) and not field.name.startswith("_") and ast.get_docstring(field):
            yield from describe_definition(field, indent, "method")


def format_title(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}\n"


def format_prose(docstring: str | None, indent: str = "") -> Iterator[str]:
    """Docstrings are plain text with `code` in backticks: tables and lists are shown as they stand."""
    for block in re.split(r"\n\s*\n", docstring or ""):
        lines = block.strip("\n").split("\n")
        if not block.strip():
            continue
        if any(line.startswith((" ", "- ", "* ")) or "  " in line.strip() for line in lines):
            yield f"{indent}::\n"
            yield from (f"{indent}    {line}" for line in lines)
        else:
            yield from (f"{indent}{line}" for line in escape("\n".join(lines)).split("\n"))
        yield ""


def escape(text: str) -> str:
    """Plain text as reStructuredText: `code` stays code, every other mark means itself."""
    parts = re.split(r"`+([^`\n]+)`+", text)
    plain = [re.sub(r"([\\*`|_<>:.-])", r"\\\1", part) for part in parts[::2]]
    code = [f"\\ ``{part.strip()}``\\ " for part in parts[1::2]]
    return "".join(a + b for a, b in zip(plain, [*code, ""], strict=True))
