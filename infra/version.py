"""Which code made a result. Provenance only: identity is the recipe hash and the stages' own versions."""

import functools
import importlib.metadata
import subprocess
from pathlib import Path


def version() -> str:
    """The version in pyproject.toml, as installed; "unknown" in a bare folder of sources."""
    try:
        return importlib.metadata.version("beeline")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@functools.cache
def code_version() -> str:
    """The version and, in a checkout, its commit: 0.2.0+1a2b3c4, with -dirty if files were changed."""
    commit = _commit(Path(__file__).resolve().parent.parent)
    return f"{version()}+{commit}" if commit else version()


def _commit(root: Path) -> str:
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
