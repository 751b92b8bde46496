"""The identity of a checkpoint: a hash of its files' content, so that moving or renaming it changes nothing."""

import hashlib
from functools import lru_cache
from pathlib import Path

from infra.errors import UserError

_SUFFIXES = (".safetensors", ".bin", ".json", ".txt", ".model", ".pt", ".pth", ".onnx")


def weights_hash(path: str | Path) -> str:
    """Sixteen hex digits over names and contents of weights, configs and vocabularies in a folder (or one file)."""
    root = Path(path)
    files = [root] if root.is_file() else sorted(f for f in root.rglob("*") if f.suffix in _SUFFIXES and f.is_file())
    if not files:
        raise UserError(f"{root}: no weights there (looked for {', '.join(_SUFFIXES[:3])})")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() if file == root else file.relative_to(root).as_posix().encode())
        digest.update(_content(file, file.stat().st_mtime_ns, file.stat().st_size))
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1024)
def _content(file: Path, changed_ns: int, size: int) -> bytes:
    """Several stages ask for the same gigabytes: read once, unless time or size of the file say that it changed."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
