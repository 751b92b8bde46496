"""Trains the world's conditioning CLIP: `python -m data_pipeline.world.training.train clip --minutes 20 --seed 21`.

An OpenCLIP model small enough to ship: 64x64 images, 16 tokens, and a byte-level BPE vocabulary of its own, because
the usual 49,408 rows would be most of the weights. Any string can be encoded; the world's words are one token each.
Shapes: B scenes, C channels, H and W pixels, L tokens, E embedding.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.checkpoints import WORLD
from data_pipeline.world.scenes import SIZE, Scene, detailed_caption, make_scene
from data_pipeline.world.training.cards import Figure, read_training_line, write_card
from data_pipeline.world.training.fit import fit, logger

BATCH = 96  # scenes a step
TOKENS = 16
MEAN, STD = (0.85, 0.82, 0.80), (0.25, 0.28, 0.30)


def make_model_config(vocab_size: int) -> dict[str, Any]:
    vision = {"image_size": SIZE, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32}
    text = {"context_length": TOKENS, "vocab_size": vocab_size, "width": 128, "heads": 4, "layers": 4}
    # With `local-dir:` open_clip reads the tokenizer from the checkpoint's own folder; the name only switches that on.
    text_cfg = text | {"hf_tokenizer_name": "local"}
    return {"embed_dim": 128, "vision_cfg": vision, "text_cfg": text_cfg}


def list_captions(scene: Scene) -> list[str]:
    """All captions of a scene: its own, the paraphrases and the detailed one."""
    return [scene.caption, *scene.alt_captions, detailed_caption(scene)]


def make_tokenizer(seed: int) -> Any:
    """Byte-level BPE learned on captions; the end token has the highest id, for `argmax` pooling."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [text for i in range(4000) for text in list_captions(make_scene(seed, i, split="clip_words", seen=None))]
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1000, min_frequency=2, initial_alphabet=alphabet))
    bpe.add_special_tokens(["<pad>", "<start>", "<end>"])
    ends = [(word, bpe.token_to_id(word)) for word in ("<start>", "<end>")]
    bpe.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        model_max_length=TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )


def write_folder(folder: Path, seed: int) -> None:
    """Tokenizer and config, from which `open_clip` builds the model."""
    tokenizer = make_tokenizer(seed)
    tokenizer.save_pretrained(folder)
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": make_model_config(len(tokenizer)), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="ascii")


def load(folder: Path, *, weights: bool = True) -> tuple[Any, Any]:
    """Model and tokenizer by open_clip's own call."""
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}", load_weights=weights)
    return model, open_clip.get_tokenizer(f"local-dir:{folder}")


def normalise(images: list[np.ndarray]) -> Tensor:
    x_BCHW = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return (x_BCHW - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def contrastive_loss(image_BE: Tensor, text_BE: Tensor, scale: Tensor, keys: list[str]) -> Tensor:
    """CLIP's symmetric cross entropy (a scalar) of normalised embeddings. Pairs with equal `keys` (compositions) are
    positives of each other: the target is spread evenly over them."""
    index = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    group_B = torch.tensor([index[key] for key in keys])
    target_BB = (group_B[:, None] == group_B[None]).float()
    target_BB = target_BB / target_BB.sum(1, keepdim=True)
    logits_BB = scale * image_BE @ text_BE.T
    return (F.cross_entropy(logits_BB, target_BB) + F.cross_entropy(logits_BB.T, target_BB)) / 2


@torch.no_grad()
def measure(model: Any, tokenizer: Any, *, seed: int = 0, num_scenes: int = 200) -> dict[str, float]:
    """Recall at 1 and 5 (0 to 1) of image-to-text and text-to-image retrieval, among held-out scenes with distinct
    captions, seen and unseen compositions mixed."""
    scenes: dict[str, Scene] = {}
    index = 0
    while len(scenes) < num_scenes:
        scene = make_scene(seed, index, split="clip_val", seen=None)
        scenes.setdefault(scene.alt_captions[0], scene)
        index += 1
    kept = list(scenes.values())
    image_BE = F.normalize(model.encode_image(normalise([scene.image for scene in kept])), dim=-1)
    figures: dict[str, float] = {}
    for name, texts in (
        ("original", [scene.caption for scene in kept]),
        ("detailed", [detailed_caption(scene) for scene in kept]),
    ):
        text_BE = F.normalize(model.encode_text(tokenizer(texts)), dim=-1)
        similarity_BB = image_BE @ text_BE.T
        for way, matrix_BB in (("image_to_text", similarity_BB), ("text_to_image", similarity_BB.T)):
            rank_B = (matrix_BB > matrix_BB.diagonal()[:, None]).sum(1)
            figures |= {f"{name}/{way}/r@{k}": float((rank_B < k).double().mean()) for k in (1, 5)}
    return figures


def train_clip(
    out: Path = WORLD / "clip",
    *,
    minutes: float = 20.0,
    seed: int = 21,
    start_from: Path | None = None,
    lr: float = 4e-3,
) -> dict[str, float]:
    """Train for `minutes`, write the open_clip folder and its model card; the figures of `measure`."""
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    history = read_training_line(start_from)
    out.mkdir(parents=True, exist_ok=True)
    write_folder(out, seed=0)
    model, tokenizer = load(start_from or out, weights=start_from is not None)

    def loss_of_step(step: int) -> Tensor:
        scenes = [make_scene(seed, i, split="clip") for i in range(step * BATCH, (step + 1) * BATCH)]
        rng = random.Random(f"{seed}/{step}")
        detailed = rng.random() < 0.35
        texts = [detailed_caption(s) if detailed else rng.choice((s.caption, *s.alt_captions)) for s in scenes]
        keys = texts if detailed else [scene.alt_captions[0] for scene in scenes]
        image_BE = F.normalize(model.encode_image(normalise([scene.image for scene in scenes])), dim=-1)
        text_BE = F.normalize(model.encode_text(tokenizer(texts)), dim=-1)
        return contrastive_loss(image_BE, text_BE, model.logit_scale.exp().clamp(max=100), keys)

    average, steps = fit(model, loss_of_step, minutes=minutes, muon_lr=lr)
    state = {name: tensor.half().contiguous() for name, tensor in average.state_dict().items()}
    save_file(state, out / "open_clip_model.safetensors")
    figures = measure(*load(out))
    logger.info("%s", json.dumps(figures))
    command = f"`python -m data_pipeline.world.training.train clip --minutes {minutes:g} --seed {seed}`"
    _write_card(out, figures, trained=f"{history}{command}: {steps} steps of {BATCH} fresh scenes")
    return figures


def _write_card(out: Path, figures: dict[str, float], *, trained: str) -> None:
    write_card(
        out,
        title="World CLIP (conditioning)",
        what="An OpenCLIP model: ViT of 4 layers and 128 channels on 8x8 patches, text tower of 4 layers, 16 tokens, "
        "its own byte-level BPE vocabulary. fp16 weights. Its text tower takes SD3's CLIP seat; it never judges.",
        load="`open_clip.create_model_and_transforms('local-dir:PATH')`, `open_clip.get_tokenizer('local-dir:PATH')`",
        trained=f"{trained}, split `clip`, seen compositions, {torch.get_num_threads()} thread, fp32",
        figures=[Figure(name, value, "") for name, value in figures.items()],
        scored="200 scenes of split `clip_val`, seed 0, with distinct captions, seen and unseen compositions. A scene "
        "of two objects fits several captions (`a cat and a dog`, `a cat left of a dog`), which bounds R@1 below one",
    )
