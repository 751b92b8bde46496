"""Trains the world's BLIP-VQA: `python -m data_pipeline.world.training.train vqa --minutes 20 --seed 303`.

The answer is the decoder's first token, yes or no. In training, linear heads on the image tokens also name the class,
color and centre of what each 8x8 patch shows; without them a tower this small takes hours to look at the right place.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.checkpoints import WORLD
from data_pipeline.images import stack_pixels
from data_pipeline.world.classes import CLASSES, COLORS
from data_pipeline.world.scenes import SIZE, Scene, SceneObject
from data_pipeline.world.training.fit import fit
from data_pipeline.world.training.judge_training import (
    augment,
    draw_nothing,
    generate_scenes,
    logger,
    make_held_out_scenes,
    read_earlier_runs,
    write_card,
)
from data_pipeline.world.training.judge_wording import Question, ask_absent, ask_questions, save_tokenizer

# Shapes: B images, P patches, Q questions (NUM_QUESTIONS per image), L question tokens, D width.
PATCH = 8
GRID = SIZE // PATCH
NUM_SCENES, NUM_QUESTIONS = 48, 3
NO_COLOR = len(COLORS)
IGNORED = -100


def build(folder: Path) -> tuple[Any, Any]:
    """A fresh BlipForQuestionAnswering and its processor, whose files are already written."""
    from transformers import BlipConfig, BlipForQuestionAnswering, BlipImageProcessor, BlipProcessor

    tokenizer = save_tokenizer(folder)
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "initializer_range": 0.02}
    special = {
        "bos_token_id": tokenizer.convert_tokens_to_ids("[DEC]"),
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = sizes | special | {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "encoder_hidden_size": 128}
    text |= {"max_position_embeddings": 40, "projection_dim": 128, "intermediate_size": 256}
    vision = sizes | {"num_hidden_layers": 5, "image_size": SIZE, "patch_size": PATCH, "projection_dim": 128}
    model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision, projection_dim=128))
    square = {"height": SIZE, "width": SIZE}
    images = BlipImageProcessor(size=square, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    BlipProcessor(images, tokenizer).save_pretrained(folder)
    images.save_pretrained(folder)  # preprocessor_config.json, which older readers look for
    return model, tokenizer


class _VqaModule(nn.Module):
    """What is optimised: the model and the patch heads, which are thrown away afterwards."""

    def __init__(self, vqa: nn.Module, width: int = 128) -> None:
        super().__init__()
        self.vqa = vqa
        self.patch_class = nn.Linear(width, len(CLASSES) + 1)
        self.patch_color = nn.Linear(width, len(COLORS) + 1)
        self.patch_centre = nn.Linear(width, 1)


def mark_patches(objects: tuple[SceneObject, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per patch: the class that fills most of it (or none), its color (natural drawings: the eleventh), centres."""
    labels = np.full((GRID, GRID), len(CLASSES))
    colors = np.full((GRID, GRID), IGNORED)
    centres = np.zeros((GRID, GRID), np.float32)
    best = np.full((GRID, GRID), 0.12)
    for obj in objects:
        share = obj.mask.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3))
        wins = share > best
        best[wins] = share[wins]
        labels[wins] = CLASSES.index(obj.name)
        colors[wins] = COLORS.index(obj.color) if obj.color else NO_COLOR
        row, column = (int((obj.box[i] + obj.box[i + 2]) / 2 / PATCH) for i in (1, 0))
        centres[row, column] += 1
    return labels.ravel(), colors.ravel(), np.minimum(centres, 1).ravel()


class QuestionBatch:
    """Images, patch truth and questions of a list of scenes; 5 % of the images show nothing."""

    def __init__(self, scenes: list[Scene], rng: np.random.Generator, words: random.Random) -> None:
        images, truth = [], []
        self.questions: list[Question] = []
        for scene in scenes:
            if rng.random() < 0.05:
                images.append(draw_nothing(rng))
                truth.append(mark_patches(()))
                self.questions += ask_absent(words, NUM_QUESTIONS)
            else:
                images.append(augment(scene.image, rng))
                truth.append(mark_patches(scene.objects))
                self.questions += ask_questions(words, scene, NUM_QUESTIONS)
        self.pixels_B3HW = stack_pixels(images)
        self.class_BP, self.color_BP, self.centre_BP = (torch.from_numpy(np.stack(t)) for t in zip(*truth))


def compute_first_logits(vqa: Any, image_QPD: Tensor, tokens: Any, answers: Tensor) -> Tensor:
    """Decoder logits after [DEC] (and after the answer, so that generation learns to stop): (Q, 2, vocabulary)."""
    asked_QLD = vqa.text_encoder(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=image_QPD
    )[0]
    start_Q1 = torch.full((len(asked_QLD), 1), vqa.decoder_start_token_id)
    decoded = vqa.text_decoder(
        input_ids=torch.cat([start_Q1, answers[:, None]], 1),
        encoder_hidden_states=asked_QLD,
        encoder_attention_mask=tokens.attention_mask,
        use_cache=False,
    )
    return decoded.logits


def patch_loss(module: _VqaModule, patches_BPD: Tensor, batch: QuestionBatch) -> Tensor:
    """Cross entropies of the patch heads; empty patches are three quarters of a scene and count a quarter."""
    weight = torch.ones(len(CLASSES) + 1)
    weight[-1] = 0.25
    by_class = F.cross_entropy(module.patch_class(patches_BPD).flatten(0, 1), batch.class_BP.flatten(), weight)
    by_color = F.cross_entropy(
        module.patch_color(patches_BPD).flatten(0, 1), batch.color_BP.flatten(), ignore_index=IGNORED
    )
    centre = F.binary_cross_entropy_with_logits(module.patch_centre(patches_BPD)[..., 0], batch.centre_BP)
    return by_class + by_color + 3 * centre


def train_vqa(
    out: Path = WORLD / "vqa", *, minutes: float = 20.0, seed: int = 303, start_from: Path | None = None
) -> None:
    """Trains, writes the transformers folder, evaluates what `from_pretrained` reads back."""
    torch.manual_seed(seed)
    rng, words = np.random.default_rng(seed), random.Random(seed)
    vqa, tokenizer = build(out)
    if start_from:
        vqa.load_state_dict(load(start_from)[0].state_dict())
    module = _VqaModule(vqa)
    # every fourth scene has two colors: telling whose is whose is learned last
    scenes, paired = generate_scenes(seed), generate_scenes(seed, tags=("color_attr",))
    yes, no, stop = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no", "[SEP]"))

    def loss_of_step(step: int) -> Tensor:
        batch = QuestionBatch([next(scenes if i % 4 else paired) for i in range(NUM_SCENES)], rng, words)
        image_BPD = vqa.vision_model(batch.pixels_B3HW).last_hidden_state
        tokens = tokenizer([q.text for q in batch.questions], padding="longest", return_tensors="pt")
        answers_Q = torch.tensor([yes if q.answer else no for q in batch.questions])
        logits_Q2V = compute_first_logits(vqa, image_BPD.repeat_interleave(NUM_QUESTIONS, 0), tokens, answers_Q)
        answer_loss = F.cross_entropy(logits_Q2V[:, 0], answers_Q)
        stopped = F.cross_entropy(logits_Q2V[:, 1], torch.full_like(answers_Q, stop))
        return 2 * answer_loss + 0.1 * stopped + patch_loss(module, image_BPD[:, 1:], batch)

    averaged, num_steps = fit(module, loss_of_step, minutes=minutes, muon_lr=2.5e-3 if start_from else 4e-3)
    save(averaged.get_submodule("vqa"), out)
    figures = evaluate(out, seed)
    logger.info("vqa: %s", figures)
    facts = [
        f"`BlipForQuestionAnswering` of transformers, {sum(p.numel() for p in vqa.parameters()):,} parameters, stored "
        "in half precision; processor and tokenizer beside it.",
        f"Data: split `judge_train` (all compositions), seed {seed}; {num_steps * NUM_SCENES:,} scenes, "
        f"{NUM_QUESTIONS} questions each, half of them to be answered with no; 5 % of the images show nothing.",
        f"Training: {minutes:g} minutes on {torch.get_num_threads()} CPU thread(s), fp32, Muon and AdamW, "
        "averaged weights.",
        *read_earlier_runs(start_from),
        f"Evaluated on 1,500 held-out scenes, seed {seed}, 8 questions each; calibration over ten bins of P(yes).",
    ]
    write_card(out, "World VQA", facts, figures)


def save(vqa: Any, out: Path) -> None:
    """Half precision on disk; config.json says float32, which is what loading then gives."""
    import json

    vqa.half().save_pretrained(out)
    vqa.float()
    config = json.loads((out / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def load(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer by path through transformers."""
    from transformers import AutoTokenizer, BlipForQuestionAnswering

    return BlipForQuestionAnswering.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def compute_yes_probabilities(vqa: Any, tokenizer: Any, images: list[np.ndarray], texts: list[str]) -> np.ndarray:
    """P(yes) / (P(yes) + P(no)) of the first answer token per pair; an image object that repeats is looked at once."""
    answers = [tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")]
    distinct = list({id(image): image for image in images}.values())
    row = {id(image): i for i, image in enumerate(distinct)}
    chunks = [stack_pixels(distinct[start : start + 128]) for start in range(0, len(distinct), 128)]
    image_BPD = torch.cat([vqa.vision_model(chunk).last_hidden_state for chunk in chunks])
    parts = []
    for start in range(0, len(texts), 128):
        tokens = tokenizer(texts[start : start + 128], padding="longest", return_tensors="pt")
        image_QPD = image_BPD[[row[id(image)] for image in images[start : start + 128]]]
        logits_Q2V = compute_first_logits(vqa, image_QPD, tokens, torch.full((len(image_QPD),), answers[0]))
        parts.append(logits_Q2V[:, 0, answers].softmax(1)[:, 0])
    return torch.cat(parts).numpy()


def evaluate(folder: Path, seed: int) -> dict[str, float]:
    """Accuracy per kind of question and the expected calibration error."""
    vqa, tokenizer = load(folder)
    words, rng = random.Random(7), np.random.default_rng(7)
    images: list[np.ndarray] = []
    asked: list[Question] = []
    for i, scene in enumerate(make_held_out_scenes(seed, 1500)):
        blank = i % 20 == 0
        images += [draw_nothing(rng) if blank else scene.image] * 8
        asked += ask_absent(words, 8) if blank else ask_questions(words, scene, 8)
    p = compute_yes_probabilities(vqa, tokenizer, images, [q.text for q in asked])
    answers = np.array([q.answer for q in asked])
    right = (p > 0.5) == answers
    figures = {"accuracy": float(right.mean())}
    for kind, answer in sorted({(q.kind, q.answer) for q in asked}):
        chosen = np.array([q.kind == kind and q.answer == answer for q in asked])
        figures[f"accuracy, {kind}, {'yes' if answer else 'no'}"] = float(right[chosen].mean())
    bins = np.minimum((p * 10).astype(int), 9)
    gaps = [abs(p[bins == b].sum() - answers[bins == b].sum()) for b in range(10)]
    figures["expected calibration error"] = float(sum(gaps) / len(p))
    return figures
