"""The identity of a checkpoint: a hash of its files' content, so that moving or renaming it changes nothing."""

import hashlib
from functools import lru_cache
from pathlib import Path

from infra.errors import UserError

_SUFFIXES = (".safetensors", ".bin", ".json", ".txt", ".model", ".pt", ".onnx")


@lru_cache(maxsize=64)
def weights_hash(path: Path) -> str:
    """Sixteen hex digits over names and contents of weights, configs and vocabularies in a folder (or one file)."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in _SUFFIXES and f.is_file())
    if not files:
        raise UserError(f"{path}: no weights there (looked for {', '.join(_SUFFIXES[:3])})")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() if file == path else file.relative_to(path).as_posix().encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
