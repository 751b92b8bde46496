"""Trains the world's captioner: `python -m data_pipeline.world.training.train captioner --minutes 20 --seed 31`.

It is a transformers `VisionEncoderDecoderModel`: a Swin of three stages reads the pixels, a GPT-2 of two layers writes
the caption. It learns `detailed_caption`, which names every color and place. No other network trains on its scenes.
Shapes: B scenes, C channels, H and W pixels, L tokens.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.checkpoints import WORLD
from data_pipeline.images import stack_pixels
from data_pipeline.world.classes import CLASSES
from data_pipeline.world.grammar import plural
from data_pipeline.world.scenes import SIZE, detailed_caption, make_scene
from data_pipeline.world.training.cards import Figure, read_training_line, write_card
from data_pipeline.world.training.fit import fit, logger
from data_pipeline.world.training.train_clip import TOKENS, make_tokenizer

BATCH = 48  # scenes a step
_NAMES = {name: name for name in CLASSES} | {plural(name): name for name in CLASSES}
_PLACE = r"(?:at the (?:top|bottom)(?: left| right)?|on the (?:left|right)|in the center)"
_THING = re.compile(rf"(?:(two|three|four) )?(\w+) ({'|'.join(sorted(_NAMES, key=len, reverse=True))})(?: ({_PLACE}))?")
_GROUP = re.compile(rf"(one|two) ({_PLACE})")


def parse_facets(caption: str) -> dict[str, list[tuple[str, ...]]]:
    """The objects, counts, colors and positions that a detailed caption names, as lists that can be compared."""
    things = [(match[1] or "one", match[2], _NAMES[match[3]], match[4] or "") for match in _THING.finditer(caption)]
    return {
        "objects": sorted((name,) for _, _, name, _ in things),
        "counts": sorted((number, name) for number, _, name, _ in things),
        "colors": sorted((color, name) for _, color, name, _ in things),
        "positions": [(name, place) for _, _, name, place in things] + _GROUP.findall(caption),
    }


def _make_model_config(tokenizer: Any) -> Any:
    from transformers import GPT2Config, SwinConfig, VisionEncoderDecoderConfig

    encoder = SwinConfig(
        image_size=SIZE,
        patch_size=4,
        embed_dim=48,
        depths=[2, 2, 2],
        num_heads=[3, 6, 12],
        window_size=4,
        use_absolute_embeddings=True,
        drop_path_rate=0.0,
    )
    decoder = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=2 * TOKENS,
        n_embd=128,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        add_cross_attention=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id = tokenizer.bos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    config.eos_token_id = tokenizer.eos_token_id
    return config


def load(folder: Path) -> tuple[Any, Any, Any]:
    """Model, image processor and tokenizer by transformers' own calls."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    model = AutoModelForImageTextToText.from_pretrained(folder).float().eval()
    return model, AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def write_captions(model: Any, tokenizer: Any, images: list[np.ndarray]) -> list[str]:
    texts: list[str] = []
    for first in range(0, len(images), 100):
        pixels_BCHW = stack_pixels(images[first : first + 100])
        ids_BL = model.generate(pixel_values=pixels_BCHW, max_new_tokens=TOKENS + 4, do_sample=False)
        texts += [text.strip() for text in tokenizer.batch_decode(ids_BL, skip_special_tokens=True)]
    return texts


def measure(model: Any, tokenizer: Any, *, seed: int = 0, num_scenes: int = 600) -> dict[str, float]:
    """Share of held-out scenes (0 to 1) in which all objects (or counts, colors, positions) are named correctly, by
    `<facet>/<seen or unseen>`; half of `num_scenes` are of unseen compositions."""
    figures = {}
    for group, seen in (("seen", True), ("unseen", False)):
        scenes = [make_scene(seed, i, split=f"captioner_val_{group}", seen=seen) for i in range(num_scenes // 2)]
        spoken = [parse_facets(text) for text in write_captions(model, tokenizer, [scene.image for scene in scenes])]
        true = [parse_facets(detailed_caption(scene)) for scene in scenes]
        for facet in true[0]:
            right = sum(a[facet] == b[facet] for a, b in zip(spoken, true, strict=True))
            figures[f"{facet}/{group}"] = right / len(scenes)
    return figures


def train_captioner(
    out: Path = WORLD / "captioner",
    *,
    minutes: float = 20.0,
    seed: int = 31,
    start_from: Path | None = None,
    lr: float = 4e-3,
) -> dict[str, float]:
    """Train for `minutes`, write the transformers folder and its model card; the figures of `measure`."""
    from transformers import VisionEncoderDecoderModel, ViTImageProcessor

    torch.manual_seed(seed)
    history = read_training_line(start_from)
    tokenizer = make_tokenizer(0)
    model: Any = load(start_from)[0] if start_from else VisionEncoderDecoderModel(_make_model_config(tokenizer))

    def loss_of_step(step: int) -> Tensor:
        scenes = [make_scene(seed, i, split="captioner") for i in range(step * BATCH, (step + 1) * BATCH)]
        texts = [detailed_caption(scene) + tokenizer.eos_token for scene in scenes]
        ids_BL = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").input_ids
        labels_BL = ids_BL.masked_fill(ids_BL == tokenizer.pad_token_id, -100)
        return model(pixel_values=stack_pixels([scene.image for scene in scenes]), labels=labels_BL).loss

    average, steps = fit(model, loss_of_step, minutes=minutes, muon_lr=lr)
    average.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    half = [0.5, 0.5, 0.5]
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=half, image_std=half).save_pretrained(out)
    model, _, tokenizer = load(out)
    figures = measure(model, tokenizer)
    logger.info("%s", json.dumps(figures))
    command = f"`python -m data_pipeline.world.training.train captioner --minutes {minutes:g} --seed {seed}`"
    _write_card(out, figures, trained=f"{history}{command}: {steps} steps of {BATCH} fresh scenes")
    return figures


def _write_card(out: Path, figures: dict[str, float], *, trained: str) -> None:
    write_card(
        out,
        title="World captioner",
        what="A transformers `VisionEncoderDecoderModel`: Swin (three stages, 48 channels, 4x4 patches) and GPT-2 (two "
        "layers, 128 channels), fp16 weights. It says every object with count, color and place.",
        load="`AutoModelForImageTextToText.from_pretrained(PATH)`, `AutoImageProcessor`, `AutoTokenizer` alike",
        trained=f"{trained}, split `captioner`, seen compositions, {torch.get_num_threads()} thread, fp32",
        figures=[Figure(name, value, "") for name, value in figures.items()],
        scored="600 scenes of splits `captioner_val_seen` and `captioner_val_unseen`, seed 0, greedy; a figure is "
        "the share of scenes in which all objects (or counts, colors, positions) are said right",
    )
