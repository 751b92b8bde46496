"""Trains the judges' OpenCLIP: `python -m data_pipeline.world.training.train judge_clip --minutes 20 --seed 202`.

Two tasks at once: whole scenes against their captions with nearly true captions as hard negatives, and GenEval's masked
crops against its color prompts. It is a ResNet, unlike the transformer that conditions the generator.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from data_pipeline.checkpoints import WORLD
from data_pipeline.world.classes import CLASSES, COLORS
from data_pipeline.world.grammar import paraphrase
from data_pipeline.world.scenes import Scene, SceneObject
from data_pipeline.world.training.fit import fit
from data_pipeline.world.training.judge_training import (
    augment,
    generate_scenes,
    logger,
    make_held_out_scenes,
    read_earlier_runs,
    to_half,
    write_card,
)
from data_pipeline.world.training.judge_wording import (
    count_classes,
    describe_claims,
    make_nearly_true,
    save_tokenizer,
    write_crop_prompt,
)

# Shapes: B images, T texts, E embedding width, H and W pixels.
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
NUM_SCENES, NUM_CROPS, NUM_WRONG = 40, 40, 2
GRAY = 0x99  # GenEval paints everything outside the instance mask #999999
TEMPLATES = ("a photo of a {c} {name}", "a photo of a {c}-colored {name}", "a photo of a {c} object")


def make_clip_config(vocab_size: int, eos_id: int) -> dict[str, Any]:
    """The open_clip_config.json of the folder; the tokenizer lies beside it."""
    text: dict[str, Any] = {"context_length": 20, "vocab_size": vocab_size, "width": 96, "heads": 4, "layers": 3}
    text |= {"hf_tokenizer_name": "local", "pool_type": "eos", "eos_id": eos_id}
    vision = {"image_size": 64, "layers": [2, 2, 3, 1], "width": 16, "head_width": 64}
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    return {"model_cfg": {"embed_dim": 128, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": preprocess}


def cut_masked(image: np.ndarray, obj: SceneObject, rng: np.random.Generator | None = None) -> np.ndarray:
    """GenEval's view of one object, as open_clip's transform sees it (shortest side to 64, center crop).

    With a generator, mask and box are off by up to a pixel, as a detector's are.
    """
    mask, box = obj.mask, np.array(obj.box)
    if rng is not None:
        box = box + rng.integers(-1, 2, 4)
        grown = np.roll(mask, int(rng.integers(-1, 2)), axis=int(rng.integers(0, 2)))
        mask = (mask | grown) if rng.random() < 0.5 else (mask & grown)
    painted = Image.fromarray(np.where(mask[..., None], image, np.uint8(GRAY)))
    x1, y1, x2, y2 = (int(v) for v in box)
    crop = painted.crop((x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)))
    scale = 64 / min(crop.size)
    width, height = (max(64, round(side * scale)) for side in crop.size)
    left, top = (width - 64) // 2, (height - 64) // 2
    resized = crop.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + 64, top + 64)))


def to_pixels(images: list[np.ndarray]) -> Tensor:
    """uint8 images to the model's input range -1..1, (B, 3, H, W)."""
    x_BHWC = torch.from_numpy(np.stack(images)).float().div_(127.5).sub_(1.0)
    return x_BHWC.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


class Tokens:
    """The tokenizer with a memory: the world has few distinct captions."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        self._tokenizer, self._length = tokenizer, length
        self._tokenized: dict[str, list[int]] = {}

    def __call__(self, texts: list[str]) -> Tensor:
        for text in texts:
            if text not in self._tokenized:
                ids = self._tokenizer(text, padding="max_length", truncation=True, max_length=self._length).input_ids
                self._tokenized[text] = ids
        return torch.tensor([self._tokenized[text] for text in texts])


@dataclass
class SceneBatch:
    images: list[np.ndarray]
    texts: list[str]  # NUM_SCENES true ones, then the wrong ones
    claims: list[tuple[Any, ...]]
    contents: list[tuple[Any, ...]]
    facts: Tensor  # (B, 20 + 10 + 4): classes, colors, number of objects


@dataclass
class CropBatch:
    images: list[np.ndarray]
    labels: list[tuple[str, str]]  # name, color
    texts: list[str]
    says: list[tuple[str | None, str]]  # name or None, color


def make_scene_batch(scenes: list[Scene], rng: np.random.Generator, words: random.Random) -> SceneBatch:
    texts = [words.choice((scene.caption, *scene.alt_captions)) for scene in scenes]
    includes = [scene.include for scene in scenes]
    for scene in scenes:
        for _ in range(NUM_WRONG):
            wrong = make_nearly_true(words, scene.tag, scene.include)
            texts.append(paraphrase(words, scene.tag, wrong))
            includes.append(wrong)
    facts = torch.zeros(len(scenes), len(CLASSES) + len(COLORS) + 4)
    for row, scene in zip(facts, scenes):
        for obj in scene.objects:
            row[CLASSES.index(obj.name)] = 1
            if obj.color:
                row[len(CLASSES) + COLORS.index(obj.color)] = 1
        row[len(CLASSES) + len(COLORS) + len(scene.objects) - 1] = 1
    images = [augment(scene.image, rng) for scene in scenes]
    return SceneBatch(
        images, texts, [describe_claims(i) for i in includes], [count_classes(i) for i in includes], facts
    )


def make_crop_batch(scenes: Iterator[Scene], rng: np.random.Generator, words: random.Random) -> CropBatch:
    """Masked crops of the colored objects of the next scenes, each with its own and two wrong color prompts."""
    images: list[np.ndarray] = []
    labels: list[tuple[str, str]] = []
    while len(images) < NUM_CROPS:
        scene = next(scenes)
        image = augment(scene.image, rng)
        for obj in scene.objects:
            if obj.color and len(images) < NUM_CROPS:
                images.append(cut_masked(image, obj, rng))
                labels.append((obj.name, obj.color))
    texts, says = [], []
    for name, color in labels:
        wrong = words.sample([c for c in COLORS if c != color], 2)
        for asked_color in (color, *wrong):
            text, named = write_crop_prompt(words, name, asked_color)
            texts.append(text)
            says.append((name if named else None, asked_color))
    return CropBatch(images, labels, texts, says)


def scene_loss(similarity_BT: Tensor, batch: SceneBatch) -> Tensor:
    """InfoNCE in both directions. Texts that may be true of another scene as well are left out of its row."""
    num = len(batch.images)
    skip_BT = torch.tensor(
        [
            [j != i and batch.contents[j] == batch.contents[i] and not _is_own(i, j) for j in range(len(batch.texts))]
            for i in range(num)
        ]
    )
    same_BT = torch.tensor([[claim == batch.claims[i] for claim in batch.claims] for i in range(num)])
    masked_BT = similarity_BT.masked_fill(skip_BT & ~same_BT, -1e4).masked_fill(same_BT & skip_BT, -1e4)
    target_B = torch.arange(num)
    return (F.cross_entropy(masked_BT, target_B) + F.cross_entropy(masked_BT[:, :num].T, target_B)) / 2


def _is_own(i: int, j: int) -> bool:
    """Whether text j is one of the wrong captions made from scene i."""
    return j >= NUM_SCENES and (j - NUM_SCENES) // NUM_WRONG == i


def crop_loss(similarity_BT: Tensor, batch: CropBatch) -> Tensor:
    """All prompts that are true of a crop share its probability; a prompt without class is true of every class."""
    true_BT = torch.tensor([[color == c and name in (n, None) for name, color in batch.says] for n, c in batch.labels])
    chosen = similarity_BT.masked_fill(~true_BT, -1e4)
    return (similarity_BT.logsumexp(1) - chosen.logsumexp(1)).mean()


class _ClipModule(nn.Module):
    """What is optimised: the CLIP model and a linear reading of plain facts that helps its image tower early on."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip
        self.facts = nn.Linear(128, len(CLASSES) + len(COLORS) + 4)


def build(folder: Path) -> tuple[Any, Tokens]:
    """A fresh model with its config and tokenizer already in the folder."""
    import open_clip

    tokenizer = save_tokenizer(folder)
    config = make_clip_config(len(tokenizer), tokenizer.sep_token_id)
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    clip = open_clip.CLIP(**config["model_cfg"], init_logit_scale=2.7)
    clip.visual.to(memory_format=torch.channels_last)
    return clip, Tokens(tokenizer, config["model_cfg"]["text_cfg"]["context_length"])


def train_judge_clip(
    out: Path = WORLD / "judge_clip", *, minutes: float = 20.0, seed: int = 202, start_from: Path | None = None
) -> None:
    """Trains, writes the folder in open_clip's local layout, evaluates what can be loaded from it."""
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    rng, words = np.random.default_rng(seed), random.Random(seed)
    clip, tokens = build(out)
    if start_from:
        clip.load_state_dict(load(start_from)[0].state_dict())
    module = _ClipModule(clip)
    scenes, colored = generate_scenes(seed), generate_scenes(seed, tags=("colors", "color_attr"))

    def loss_of_step(step: int) -> Tensor:
        batch = make_scene_batch([next(scenes) for _ in range(NUM_SCENES)], rng, words)
        crops = make_crop_batch(colored, rng, words)
        image_BE = clip.encode_image(to_pixels(batch.images + crops.images))
        text_TE = clip.encode_text(tokens(batch.texts + crops.texts), normalize=True)
        scale = clip.logit_scale.exp().clamp(max=100)
        unit_BE = F.normalize(image_BE, dim=-1)
        on_scenes = scene_loss(scale * unit_BE[:NUM_SCENES] @ text_TE[: len(batch.texts)].T, batch)
        on_crops = crop_loss(scale * unit_BE[NUM_SCENES:] @ text_TE[len(batch.texts) :].T, crops)
        plain = F.binary_cross_entropy_with_logits(module.facts(image_BE[:NUM_SCENES]), batch.facts)
        return on_scenes + on_crops + plain

    averaged, num_steps = fit(module, loss_of_step, minutes=minutes, muon_lr=2.5e-3 if start_from else 4e-3)
    save_file(to_half(averaged.get_submodule("clip")), out / "open_clip_model.safetensors")
    figures = evaluate(out, seed)
    logger.info("judge_clip: %s", figures)
    facts = [
        f"OpenCLIP model (ResNet image tower, {sum(p.numel() for p in clip.parameters()):,} parameters, stored in half "
        "precision): `open_clip.create_model_and_transforms('local-dir:FOLDER')`.",
        f"Data: split `judge_train` (all compositions), seed {seed}; {num_steps:,} steps of {NUM_SCENES} scenes with "
        f"{NUM_WRONG} nearly true captions each and {NUM_CROPS} masked crops with 2 wrong colors each.",
        f"Training: {minutes:g} minutes on {torch.get_num_threads()} CPU thread(s), fp32, Muon and AdamW, "
        "averaged weights.",
        *read_earlier_runs(start_from),
        f"Evaluated on held-out scenes, seed {seed}: 1,500 with their own crops, retrieval among 500.",
    ]
    write_card(out, "World judge CLIP", facts, figures)


def load(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer through open_clip's own loader."""
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    return model, open_clip.get_tokenizer(f"local-dir:{folder}")


@torch.inference_mode()
def read_color_heads(model: Any, tokenizer: Any) -> dict[str, Tensor]:
    """GenEval's zero-shot heads: per class name the mean of three unit prompts for each color, made unit again."""
    heads = {}
    for name in CLASSES:
        prompts = [template.format(c=color, name=name) for color in COLORS for template in TEMPLATES]
        parts = model.encode_text(tokenizer(prompts), normalize=True).unflatten(0, (len(COLORS), len(TEMPLATES)))
        heads[name] = F.normalize(parts.mean(1), dim=-1)
    return heads


@torch.inference_mode()
def evaluate(folder: Path, seed: int) -> dict[str, float]:
    """Color accuracy of true masked crops, retrieval both ways, and telling captions from nearly true ones."""
    model, tokenizer = load(folder)
    scenes = make_held_out_scenes(seed, 1500)
    figures = {}
    crops = [(cut_masked(scene.image, o), o) for scene in scenes for o in scene.objects if o.color]
    features_BE = model.encode_image(to_pixels([image for image, _ in crops]), normalize=True)
    heads = read_color_heads(model, tokenizer)
    hits: dict[str, list[bool]] = {color: [] for color in COLORS}
    for feature_E, (_, obj) in zip(features_BE, crops):
        hits[str(obj.color)].append(COLORS[int((heads[obj.name] @ feature_E).argmax())] == obj.color)
    figures["color accuracy"] = float(np.mean([hit for row in hits.values() for hit in row]))
    figures |= {f"color accuracy, {color}": float(np.mean(row)) for color, row in hits.items()}
    return figures | _measure_retrieval(model, tokenizer, scenes[:500]) | _write_hard_captions(model, tokenizer, scenes)


def _measure_retrieval(model: Any, tokenizer: Any, scenes: list[Scene]) -> dict[str, float]:
    image_BE = model.encode_image(to_pixels([scene.image for scene in scenes]), normalize=True)
    text_BE = model.encode_text(tokenizer([scene.caption for scene in scenes]), normalize=True)
    similarity = image_BE @ text_BE.T
    claims = [describe_claims(scene.include) for scene in scenes]
    figures = {}
    for name, table in (("image to text", similarity), ("text to image", similarity.T)):
        found = table.argmax(1).tolist()
        figures[f"retrieval at 1, {name}"] = float(np.mean([claims[i] == claims[j] for i, j in enumerate(found)]))
    return figures


def _write_hard_captions(model: Any, tokenizer: Any, scenes: list[Scene]) -> dict[str, float]:
    words = random.Random(7)
    wrong = [paraphrase(words, scene.tag, make_nearly_true(words, scene.tag, scene.include)) for scene in scenes]
    image_BE = model.encode_image(to_pixels([scene.image for scene in scenes]), normalize=True)
    true_BE = model.encode_text(tokenizer([scene.caption for scene in scenes]), normalize=True)
    wrong_BE = model.encode_text(tokenizer(wrong), normalize=True)
    better = (image_BE * (true_BE - wrong_BE)).sum(1) > 0
    tags = sorted({scene.tag for scene in scenes})
    return {
        f"caption against a nearly true one, {tag}": float(
            np.mean([bool(b) for b, scene in zip(better, scenes) if scene.tag == tag])
        )
        for tag in tags
    }
