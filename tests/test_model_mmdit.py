"""MM-DiT against diffusers with the same weights (outputs and gradients), its size, its masks, its input checks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from infra.errors import UserError
from model.backbones.mmdit import MMDiT, MMDiTConfig
from model.encoders.text import TextCond
from model.files.names import from_diffusers, make_diffusers_config, to_diffusers

BASE = MMDiTConfig(depth=2, in_channels=4, context_width=48, pooled_width=24, pos_max=12, pos_tokens=8, pos_base=8)


def config_with(**changes: object) -> MMDiTConfig:
    return MMDiTConfig.from_json({**BASE.to_json(), **changes})


def random_model(config: MMDiTConfig) -> MMDiT:
    """Every parameter random: the initial zeros of modulation and output would hide most of the network."""
    model = config.build(seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        offset = 1.0 if "norm_" in name else 0.0
        nn.init.normal_(parameter, offset, scale, generator=generator)
    return model


def inputs(config: MMDiTConfig, height: int = 16, width: int = 16, batch: int = 2, text_tokens: int = 6):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(batch, config.in_channels, height, width, generator=g)
    text = TextCond(
        torch.randn(batch, text_tokens, config.context_width, generator=g),
        torch.randn(batch, config.pooled_width, generator=g),
    )
    return x, torch.rand(batch, generator=g), text


def diffusers_twin(model: MMDiT) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    arguments = make_diffusers_config(model.config)
    twin = SD3Transformer2DModel(**arguments)
    twin.load_state_dict(dict(to_diffusers(model.config, model.state_dict())))
    return twin


def run_twin(twin: nn.Module, x: Tensor, t_B: Tensor, text: TextCond) -> Tensor:
    return twin(x, text.context_BLD, text.pooled_BP, 1000 * t_B, return_dict=False)[0]


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, (16, 16)),
        ({"qk_norm": False}, (16, 16)),
        ({"depth": 3}, (12, 20)),
        ({"depth": 4, "dual_attention": [0, 1]}, (20, 8)),
        ({"depth": 4, "dual_attention": [1], "qk_norm": False}, (16, 16)),
        ({"depth": 6, "qk_norm": False}, (24, 6)),
        ({"depth": 6, "in_channels": 16}, (16, 16)),
    ],
)
def test_outputs_and_gradients_equal_diffusers(changes: dict, size: tuple[int, int]) -> None:
    model = random_model(config_with(**changes))
    twin = diffusers_twin(model)
    x, t_B, text = inputs(model.config, *size)
    out, theirs = model(x, t_B, text), run_twin(twin, x, t_B, text)
    assert (out - theirs).detach().abs().max() <= 1e-5
    push = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    (out * push).mean().backward()
    (theirs * push).mean().backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in twin.named_parameters()}
    # Renaming is linear, so it carries gradients; tensors are compared as we hold them (qkv fused).
    positions = twin.pos_embed.pos_embed
    expected = from_diffusers(model.config, {**gradients, "pos_embed.pos_embed": positions}, "gradients")
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name


def closed_form(depth: int) -> int:
    """Summed by hand over SD3's layers: 16 channels, no QK-norm."""
    h = 64 * depth
    blocks = (depth - 1) * (36 * h * h + 30 * h) + 23 * h * h + 20 * h
    return blocks + 2 * h * h + 6470 * h + 2 * h * h + 66 * h + 64


@pytest.mark.parametrize("depth", [15, 18, 21, 24, 30, 38])
def test_parameter_count_is_the_papers(depth: int) -> None:
    config = MMDiTConfig(depth=depth, qk_norm=False)
    with torch.device("meta"):
        counted = sum(p.numel() for p in config.build().parameters())
        normed = sum(p.numel() for p in MMDiTConfig(depth=depth).build().parameters())
    assert counted == config.count_parameters() == closed_form(depth)
    assert normed == MMDiTConfig(depth=depth).count_parameters() == counted + 256 * depth
    if depth == 24:
        assert counted == 2_028_328_000


def test_parameter_count_of_dual_attention() -> None:
    config = config_with(depth=4, dual_attention=[0, 2])
    assert sum(p.numel() for p in config.build().parameters()) == config.count_parameters()


def test_masked_text_keys_do_not_reach_the_image() -> None:
    model = random_model(config_with(depth=3))
    x, t_B, text = inputs(model.config)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()
    noisy = torch.where(mask[..., None], text.context_BLD, 100 * torch.randn(text.context_BLD.shape))
    one, other = (model(x, t_B, TextCond(c, text.pooled_BP, mask)) for c in (text.context_BLD, noisy))
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    # ... and equals leaving those tokens out, sample by sample.
    for row in range(2):
        kept = TextCond(text.context_BLD[row : row + 1, mask[row]], text.pooled_BP[row : row + 1])
        alone = model(x[row : row + 1], t_B[row : row + 1], kept)
        torch.testing.assert_close(one[row : row + 1], alone, atol=2e-5, rtol=1e-5)


def test_a_full_mask_is_no_mask() -> None:
    model = random_model(BASE)
    x, t_B, text = inputs(BASE)
    masked = TextCond(text.context_BLD, text.pooled_BP, torch.ones(2, 6, dtype=torch.bool))
    torch.testing.assert_close(model(x, t_B, masked), model(x, t_B, text), atol=1e-6, rtol=1e-6)


def test_a_fresh_model_is_decided_by_its_seed() -> None:
    first, again, other = BASE.build(seed=0), BASE.build(seed=0), BASE.build(seed=1)
    name = "blocks.0.image.qkv.linear.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_positions_follow_the_paper_at_any_target() -> None:
    """SD3 5.3.2: positions (p - (max - s)/2) * 256/S, centre crop, columns in the first half of the channels."""
    model = config_with(pos_max=12, pos_tokens=8, pos_base=4).build()
    table = model.positions(3, 6).view(3, 6, -1)
    width = table.shape[-1]
    frequencies = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    for row in range(3):
        for column in range(6):
            angles = [((p + offset) - (12 - 8) / 2) * 4 / 8 * frequencies for p, offset in ((column, 3), (row, 4))]
            expected = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)])
            torch.testing.assert_close(table[row, column].double(), expected, atol=1e-6, rtol=0)
    square = config_with(pos_max=16, pos_tokens=8, pos_base=8).build().positions(8, 8).view(8, 8, -1)
    torch.testing.assert_close(square[0, :, 0], torch.sin(torch.arange(8.0)))


def test_positions_stay_float32_when_the_model_is_cast() -> None:
    table = BASE.build().positions.axes_2PD
    model = BASE.build().to(torch.bfloat16)
    assert model.positions.axes_2PD.dtype == torch.float32
    assert torch.equal(model.positions.axes_2PD, table)


def test_meta_device_then_reset_fills_everything() -> None:
    with torch.device("meta"):
        model = BASE.build()
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.equal(model.positions.axes_2PD, BASE.build().positions.axes_2PD)


@pytest.mark.parametrize(
    ("x_shape", "widths", "named"),
    [
        ((1, 4, 15, 16), (48, 24), "15x16"),
        ((1, 5, 16, 16), (48, 24), "5 channels"),
        ((1, 4, 26, 16), (48, 24), "13x8"),
        ((1, 4, 16, 16), (40, 24), "40"),
        ((1, 4, 16, 16), (48, 20), "20"),
    ],
)
def test_wrong_shapes_are_named(x_shape: tuple, widths: tuple, named: str) -> None:
    text = TextCond(torch.zeros(1, 3, widths[0]), torch.zeros(1, widths[1]))
    with pytest.raises(UserError, match=named):
        BASE.build()(torch.zeros(x_shape), torch.zeros(1), text)


def test_parts_of_different_batches_are_named() -> None:
    model, x, t_B = BASE.build(), torch.zeros(2, 4, 16, 16), torch.zeros(2)

    def text(rows: int, mask: Tensor | None = None) -> TextCond:
        return TextCond(torch.zeros(rows, 3, 48), torch.zeros(rows, 24), mask)

    for arguments, named in (
        ((x, t_B, text(3)), r"2 latents .* 3 \(context\)"),
        ((x, torch.zeros(3), text(2)), r"times of shape \(3,\)"),
        ((x[0], t_B, text(2)), r"\(4, 16, 16\), expected"),
        ((x[:, :, :0], t_B, text(2)), r"\(2, 4, 0, 16\), expected"),
        ((x, t_B, text(2, torch.ones(2, 5).bool())), r"\(2, 5\) .* expected \(2, 3\)"),
        ((x, t_B, text(2, torch.ones(2, 3))), r"float32, expected .* torch\.bool"),
    ):
        with pytest.raises(UserError, match=named):
            model(*arguments)


def test_wrong_configs_are_named() -> None:
    for changes, says in (
        ({"depth": "3"}, "depth is '3', expected an integer"),
        ({"patch": 1.5}, "patch is 1.5, expected an integer"),
        ({"qk_norm": "no"}, "qk_norm is 'no', expected true or false"),
        ({"depth": 4, "dual_attention": [1, 1]}, "twice"),
    ):
        with pytest.raises(UserError, match=says):
            config_with(**changes)
    with pytest.raises(UserError, match="MMDiTConfig lacks 'depth'"):
        MMDiTConfig.from_json({"patch": 2})
    with pytest.raises(UserError, match="did you mean 'depth'"):
        MMDiTConfig.from_json({"dept": 3})
    with pytest.raises(UserError, match="outside"):
        config_with(dual_attention=[2])
    with pytest.raises(UserError, match="pos_tokens=13"):
        config_with(pos_tokens=13).build()
    assert math.isclose(BASE.width, 128)
