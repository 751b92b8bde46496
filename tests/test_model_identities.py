"""Backbones against each other: with tied or silenced weights one must become another. And every released size fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from model.backbone import read_config
from model.backbones.mmdit import MMDiTConfig
from model.encoders.text import TextCond
from model.files.names import make_diffusers_config, read_diffusers_config, to_diffusers, to_sd3_name

SMALL = {"depth": 3, "in_channels": 4, "context_width": 48, "pooled_width": 24}
GRID = {"pos_max": 12, "pos_tokens": 8, "pos_base": 8}


def build(name: str, **changes: object) -> nn.Module:
    """Every parameter random, output and modulation included."""
    model = read_config(name, {**SMALL, **GRID, **changes}).build()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        nn.init.normal_(parameter, std=scale, generator=generator)
    return model


def inputs(masked: bool) -> tuple[Tensor, Tensor, TextCond]:
    g = torch.Generator().manual_seed(3)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0]]).bool() if masked else None
    text = TextCond(torch.randn(2, 7, 48, generator=g), torch.randn(2, 24, generator=g), mask)
    return torch.randn(2, 4, 12, 20, generator=g), torch.rand(2, generator=g), text


def assert_alike(one: Tensor, other: Tensor) -> None:
    assert float(one.detach().std()) > 0.05
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_three_weight_sets_with_equal_text_sets_are_two(qk_norm: bool, masked: bool) -> None:
    two = build("mmdit", qk_norm=qk_norm)
    three = build("mmdit3", qk_norm=qk_norm, clip_tokens=4)
    source = two.state_dict()
    three.load_state_dict(
        {name: source[name.replace(".clip.", ".text.").replace(".t5.", ".text.")] for name in three.state_dict()}
    )
    assert_alike(three(*inputs(masked)), two(*inputs(masked)))
    with torch.no_grad():
        three.blocks[0].t5.mlp.inner.weight.mul_(1.5)
    assert float((three(*inputs(masked)) - two(*inputs(masked))).detach().abs().max()) > 1e-4


@pytest.mark.parametrize("name", ["dit", "mmdit", "cross_dit"])
def test_text_in_half_precision_is_widened_exactly(name: str) -> None:
    x, t_B, text = inputs(masked=True)
    half, model = replace(text, context_BLD=text.context_BLD.half()), build(name)
    assert torch.equal(model(x, t_B, half), model(x, t_B, half.to(dtype=torch.float32)))


@pytest.mark.parametrize("masked", [True, False])
def test_mmdit_with_one_weight_set_is_dit(masked: bool) -> None:
    """The last text stream gives keys and values only: of its six modulations the first two are left."""
    one, two = build("dit"), build("mmdit")
    source = one.state_dict()
    tied = {}
    for name, parameter in two.state_dict().items():
        found = source[name.replace(".image.", ".stream.").replace(".text.", ".stream.")]
        tied[name] = found[: len(parameter)] if f"blocks.{SMALL['depth'] - 1}.text.modulate" in name else found
    two.load_state_dict(tied)
    assert_alike(two(*inputs(masked)), one(*inputs(masked)))


def test_cross_dit_that_does_not_read_is_dit_without_text() -> None:
    crossed, plain = build("cross_dit"), build("dit")
    source = crossed.state_dict()
    plain.load_state_dict({name: source[name] for name in plain.state_dict()})
    with torch.no_grad():
        for block in crossed.blocks:
            block.cross.out.weight.zero_()
            block.cross.out.bias.zero_()
    x, t_B, text = inputs(masked=False)
    hidden = TextCond(text.context_BLD, text.pooled_BP, torch.zeros(2, 7, dtype=torch.bool))
    assert_alike(crossed(x, t_B, text), plain(x, t_B, hidden))


def test_dual_attention_that_is_silent_is_a_joint_block() -> None:
    dual, plain = build("mmdit", dual_attention=[1]), build("mmdit")
    with torch.no_grad():
        dual.blocks[1].self_attention.out.weight.zero_()
        dual.blocks[1].self_attention.out.bias.zero_()
    source = dual.state_dict()
    plain.load_state_dict({name: source[name][: len(value)] for name, value in plain.state_dict().items()})
    assert_alike(dual(*inputs(True)), plain(*inputs(True)))


# num_layers, qk_norm, dual attention, side of the stored position table: Stability's model cards and config.json files.
RELEASED = {
    "stable-diffusion-3-medium": (24, None, [], 192, 2_028_328_000),
    "stable-diffusion-3.5-large": (38, "rms_norm", [], 192, 8_056_627_520),
    "stable-diffusion-3.5-medium": (24, "rms_norm", list(range(13)), 384, None),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_fit(name: str) -> None:
    """Names and shapes equal diffusers' own model of that configuration, on the meta device."""
    from diffusers import SD3Transformer2DModel

    layers, qk_norm, dual, side, count = RELEASED[name]
    told = {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": layers, "attention_head_dim": 64,
        "num_attention_heads": layers, "joint_attention_dim": 4096, "caption_projection_dim": 64 * layers,
        "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": side, "qk_norm": qk_norm,
        "dual_attention_layers": dual,
    }  # fmt: skip
    config = read_diffusers_config(told, name)
    with torch.device("meta"):
        ours = config.build()
        theirs = SD3Transformer2DModel(**told).state_dict()
    mapped = dict(to_diffusers(config, ours.state_dict()))
    assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in theirs.items()}
    assert config.count_parameters() == sum(p.numel() for p in ours.parameters())
    if count is not None:
        assert config.count_parameters() == count
    stated = {k: v for k, v in make_diffusers_config(config).items() if k != "sample_size"}
    assert stated == {k: v for k, v in told.items() if k != "sample_size"}


def test_names_of_the_released_single_files() -> None:
    """Spot checks in Stability's dialect; the rest follows from the table in model/files/names.py."""
    assert isinstance(read_config("mmdit", {"depth": 24, "dual_attention": list(range(13))}), MMDiTConfig)
    for ours, theirs in (
        ("blocks.3.image.qkv.norm_q.weight", "joint_blocks.3.x_block.attn.ln_q.weight"),
        ("blocks.0.self_attention.qkv.linear.bias", "joint_blocks.0.x_block.attn2.qkv.bias"),
        ("blocks.23.text.modulate.linear.weight", "joint_blocks.23.context_block.adaLN_modulation.1.weight"),
        ("condition.pooled.outer.bias", "y_embedder.mlp.2.bias"),
        ("final.linear.weight", "final_layer.linear.weight"),
        ("blocks.7.text.mlp.outer.weight", "joint_blocks.7.context_block.mlp.fc2.weight"),
    ):
        assert to_sd3_name(ours) == theirs
