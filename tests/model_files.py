"""Tiny weights, autoencoders and encoders as files, and diffusers' pipeline with every warning made a failure."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from model.backbones.mmdit import MMDiTConfig
from model.files.weights import save_weights

CONFIG = MMDiTConfig(depth=2, in_channels=4, context_width=48, pooled_width=24, pos_max=12, pos_tokens=8, pos_base=8)
DUAL = MMDiTConfig.from_json({**CONFIG.to_json(), "depth": 3, "dual_attention": [0]})
META = {"kind": "ema", "backbone": "mmdit", "config": CONFIG.to_json(), "images_seen": 7, "shift": 1.0}


def weights_of(config: MMDiTConfig = CONFIG) -> dict[str, Tensor]:
    model = config.build(seed=3)
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.08, generator=generator)
    return model.state_dict()


def saved(folder: Path, config: MMDiTConfig = CONFIG) -> Path:
    return save_weights(folder / "ema.safetensors", weights_of(config), {**META, "config": config.to_json()})


def write_vae(folder: Path, channels: int = 4) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(8)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=1.5,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).save_pretrained(folder)
    return folder


def load_pipeline(folder: Path, **absent: None):
    """from_pretrained, with every warning turned into a failure."""
    from diffusers import StableDiffusion3Pipeline

    records: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    handler = Keep(level=logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pipeline = StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True, **absent)
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    ours = [str(w.message) for w in caught if not issubclass(w.category, (DeprecationWarning, ResourceWarning))]
    assert records + ours == []
    return pipeline


def write_sd3_encoders(root: Path) -> dict[str, Path]:
    """Tiny encoders of the classes that SD3's repository names, tokenizers included."""
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5TokenizerFast,
    )

    torch.manual_seed(11)
    out = {}
    for seat, width, projection in (("clip_l", 16, 10), ("clip_g", 24, 14)):
        vocab = {"a</w>": 0, "b</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
        text = CLIPTextConfig(
            vocab_size=4,
            hidden_size=width,
            intermediate_size=32,
            projection_dim=projection,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=3,
        )
        CLIPTextModelWithProjection(text).save_pretrained(root / seat)
        CLIPTokenizer(vocab=vocab, merges=[], model_max_length=8).save_pretrained(root / seat)
        out[seat] = root / seat
    t5 = T5Config(vocab_size=8, d_model=48, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(t5).save_pretrained(root / "t5")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581a", -1.0), ("\u2581b", -1.0), ("\u2581", -2.0)]
    T5TokenizerFast(vocab=pieces, extra_ids=0).save_pretrained(root / "t5")
    return {**out, "t5": root / "t5"}
