"""Models born in diffusers: saved by it, converted, denoised by our sampler over 10 steps, to the same latents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from infra.errors import UserError
from model.diffusion.sampler import solve
from model.encoders.text import TextCond
from model.files.convert import convert
from model.files.weights import load_model, load_weights

BORN = {
    "sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 64,
    "num_attention_heads": 3, "joint_attention_dim": 48, "caption_projection_dim": 192, "pooled_projection_dim": 24,
    "out_channels": 4, "pos_embed_max_size": 12,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def born(folder: Path, **changes: object) -> nn.Module:
    """A random transformer, saved as its own class saves it."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(5)
    model = SD3Transformer2DModel(**{**BORN, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"qk_norm": "rms_norm"}, (16, 16)),
        ({}, (12, 20)),
        ({"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}, (20, 8)),
    ],
)
def test_ten_steps_of_theirs_are_ten_of_ours(tmp_path: Path, changes: dict, size: tuple[int, int]) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = born(tmp_path / "born", **changes)
    convert(tmp_path / "born", tmp_path / "ours.safetensors", kind="raw")
    model, meta = load_model(tmp_path / "ours.safetensors")
    assert meta["config"]["qk_norm"] == ("qk_norm" in changes)
    g = torch.Generator().manual_seed(6)
    noise = torch.randn(2, 4, *size, generator=g)
    text, uncond = (TextCond(torch.randn(2, 6, 48, generator=g), torch.randn(2, 24, generator=g)) for _ in range(2))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    latents = noise.clone()
    with torch.no_grad():
        for t in scheduler.timesteps:
            with_text, without = (
                theirs(latents, c.context_BLD, c.pooled_BP, t.expand(2), return_dict=False)[0] for c in (text, uncond)
            )
            latents = scheduler.step(without + 4.0 * (with_text - without), t, latents, return_dict=False)[0]
    ours = solve(
        model, noise, text, uncond, steps=10, guidance=4.0, shift=3.0, formulation="rf", grid="released"
    ).latents
    assert float((ours - latents).abs().max()) <= 1e-4
    assert float((ours - noise).std()) > 0.1
    # ... and back into its own class, tensor for tensor.
    convert(tmp_path / "ours.safetensors", tmp_path / "again")
    returned = type(theirs).from_pretrained(tmp_path / "again" / "transformer", local_files_only=True)
    for name, value in theirs.state_dict().items():
        assert torch.equal(returned.state_dict()[name], value), name


def test_foreign_shapes_are_refused(tmp_path: Path) -> None:
    born(tmp_path / "wide", num_attention_heads=2, caption_projection_dim=128)
    with pytest.raises(UserError, match="3 layers with 2 heads"):
        convert(tmp_path / "wide", tmp_path / "x.safetensors")
    born(tmp_path / "short")
    config = tmp_path / "short" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pooled_projection_dim": 20}))
    with pytest.raises(UserError, match=r"misshapen .time_text_embed\.text_embedder\.linear_1\.weight"):
        convert(tmp_path / "short", tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no weights file"):
        load_weights(tmp_path / "x.safetensors")
