"""The commands of `python -m model`: describe models and objectives, convert weights."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


def info(
    model: Annotated[str, tyro.conf.Positional],
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
    qk_norm: bool = True,
    text_tokens: int | None = None,
) -> None:
    """Parameters, FLOPs and activation memory of a model.

    Args:
        model: d15, d24, d38 ... (an SD3-shaped MM-DiT of that depth), dit-d24 or another backbone, or a weights file.
        json_: Print JSON instead of a table.
        qk_norm: With RMS-normalised queries and keys; a weights file states its own.
        text_tokens: Length of the text context; by default that of a weights file, else SD3's 77 CLIP and 77 T5 tokens.
    """
    from model.describe import describe

    row = describe(model, qk_norm=qk_norm, text_tokens=text_tokens)
    _print(row, json_)


def formulations(json_: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """List the 61 training objectives (and any added since) with path, target, weight, density and sampling grid.

    Args:
        json_: Print JSON instead of a table.
    """
    from model.describe import list_formulations

    rows = list_formulations()
    if json_:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'name':24}{'predicts':10}{'density':20}{'weight':40}starts at")
    for row in rows:
        print(
            f"{row['name']:24}{row['target']:10}{row['density']:20}{row['weight']:40}"
            f"{row['sampling_grid']['coordinate']}={row['sampling_grid']['start']:.4g}"
        )


def plot_densities(out: Path) -> None:
    """Draw timestep densities, the resolution shift and the loss weights.

    Args:
        out: Folder for densities.png, shift.png and weights.png.
    """
    from model.diffusion.plots import plot_densities as draw

    for path in draw(out):
        print(path)


def convert(
    source: Annotated[Path, tyro.conf.Positional],
    target: Annotated[Path, tyro.conf.Positional],
    to: Literal["beeline", "sd3", "diffusers"] | None = None,
    kind: Literal["raw", "ema"] = "ema",
    add_qk_norm: bool = False,
    vae: Path | None = None,
    clip_l: Path | None = None,
    clip_g: Path | None = None,
    t5: Path | None = None,
) -> None:
    """Convert weights between our files, SD3/SD3.5 single files and diffusers folders.

    Args:
        source: A .safetensors file (ours or SD3's) or a diffusers pipeline or transformer folder.
        target: What to write; a folder for diffusers, else a .safetensors file.
        to: Dialect to write. By default ours becomes diffusers (SD3 where target ends in .safetensors), others ours.
        kind: What weights from elsewhere are labelled as.
        add_qk_norm: Add RMS-normalised queries and keys (scales 1) to weights trained without, to train on from there.
        vae: Autoencoder folder to put into the diffusers pipeline.
        clip_l: transformers folder of CLIP-L to put into the pipeline.
        clip_g: transformers folder of CLIP-G to put into the pipeline.
        t5: transformers folder of the T5 encoder to put into the pipeline.
    """
    from model.files.convert import convert as run

    given = {"clip_l": clip_l, "clip_g": clip_g, "t5": t5}
    encoders = {seat: path for seat, path in given.items() if path is not None}
    print(run(source, target, to=to, kind=kind, with_qk_norm=add_qk_norm, vae=vae, encoders=encoders))


def merge(
    base: Annotated[Path, tyro.conf.Positional],
    adapter: Annotated[Path, tyro.conf.Positional],
    target: Annotated[Path, tyro.conf.Positional],
) -> None:
    """Merge a LoRA adapter into the weights that it was trained on.

    Args:
        base: Our .safetensors file.
        adapter: Folder of `python -m trainer export RUN --lora adapter`, or a file with names of diffusers or kohya.
        target: The .safetensors file to write: ordinary weights.
    """
    from model.lora import merge_files

    print(merge_files(base, adapter, target))


def _print(row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(row, indent=1))
        return
    for key, value in row.items():
        print(f"{key:28}{value:,}" if isinstance(value, int) and not isinstance(value, bool) else f"{key:28}{value}")
