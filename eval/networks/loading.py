"""How the networks that judge are loaded: what is wrong with a checkpoint becomes one line that names it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.errors import UserError, list_some


@contextlib.contextmanager
def explain_failure(what: str, where: str | Path) -> Iterator[None]:
    """UserError instead of whatever a library raises at a checkpoint that is torn, of another kind, or has no device.

    `what` is the network in words ("CLIP"), `where` the path that the user gave.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # torch, safetensors, transformers and open_clip raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot load {what} from {where} ({type(error).__name__}: {reason})") from error


def load_pretrained(
    architecture: Any,
    path: str | Path,
    *,
    what: str,
    device: str = "cpu",
    families: tuple[str, ...] = (),
    unused: tuple[str, ...] = (),
) -> Any:
    """A transformers network of a local folder, in eval mode on the device; UserError where its config names another
    family than one of `families`, if any are given.

    Weights that the folder lacks would be random and so would be the scores: UserError, but for names that begin with
    one of `unused`, which no forward pass reads.
    """
    from transformers import AutoConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar per checkpoint would bury our own
    if not (Path(path) / "config.json").exists():
        raise UserError(f"no {what} at {path}: expected a transformers folder with config.json and weights")
    with explain_failure(what, path):
        if families and (family := AutoConfig.from_pretrained(str(path)).model_type) not in families:
            raise UserError(f"{path} holds a {family} model; expected {' or '.join(families)}")
        model, found = architecture.from_pretrained(str(path), local_files_only=True, output_loading_info=True)
        missing = sorted(name for name in found["missing_keys"] if not name.startswith(unused))
        if missing:
            raise UserError(f"{path} holds no {what}: it lacks {list_some(missing)}; expected a folder of that network")
        return model.to(device).eval()
