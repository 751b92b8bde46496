"""Which code made a result. Provenance only: identity is the recipe hash and the stages' own versions."""

import functools
import importlib.metadata
import subprocess
from pathlib import Path


@functools.cache
def code_version() -> str:
    """`git describe` of the checkout this package lies in, else the installed version."""
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags"]
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            found = ""
        if found:
            return found
    try:
        return importlib.metadata.version("beeline")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
