"""FLOPs in closed form equal torch's counter, forward and backward (the counter sees 0 in fused CPU attention)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.backbone import BACKBONES, read_config
from model.backbones.cross_dit import CrossDiTConfig
from model.backbones.mmdit import MMDiTConfig
from model.backbones.mmdit3 import MMDiT3Config
from model.backbones.uvit import UViTConfig
from model.encoders.text import TextCond
from model.flops import estimate_train_flops

SMALL = {"in_channels": 4, "context_width": 48, "pooled_width": 24, "pos_max": 16, "pos_tokens": 8, "pos_base": 8}
NEEDED = {"mmdit3": {"clip_tokens": 3}}
CONFIGS = [read_config(name, {"depth": 2, **NEEDED.get(name, {}), **SMALL}) for name in BACKBONES] + [
    CrossDiTConfig(depth=2, qk_norm=False, **SMALL),
    MMDiT3Config(depth=3, clip_tokens=3, **SMALL),
    MMDiTConfig(depth=4, qk_norm=False, dual_attention=(0, 2), **SMALL),
    UViTConfig(depth=1, res_blocks=1, qk_norm=False, **SMALL),
    MMDiTConfig(depth=2, second_time=True, **SMALL),
    UViTConfig(depth=1, second_time=True, **SMALL),
]


@pytest.fixture(autouse=True)
def _math_attention() -> Iterator[None]:
    torch.set_num_threads(1)
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.name}-d{c.depth}{'-r' * c.second_time}")
@pytest.mark.parametrize("masked", [False, True])
def test_flops_equal_the_counter(config, masked: bool) -> None:
    batch, height, width, text_tokens = 3, 12, 20, 7
    mask = torch.ones(batch, text_tokens, dtype=torch.bool) if masked else None
    text = TextCond(torch.randn(batch, text_tokens, 48), torch.randn(batch, 24), mask)
    model = config.build()
    with FlopCounterMode(display=False) as forward:
        out = model(torch.randn(batch, 4, height, width), torch.rand(batch), text)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == batch * config.count_forward_flops(height, width, text_tokens)
    assert backward.get_total_flops() == batch * config.count_backward_flops(height, width, text_tokens)
    assert config.count_parameters() == sum(p.numel() for p in model.parameters())
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("depth", [24, 38])
def test_flops_of_the_large_models_on_the_meta_device(depth: int) -> None:
    config = MMDiTConfig(depth=depth)
    with torch.device("meta"):
        model = config.build()
        text = TextCond(torch.empty(1, 154, 4096), torch.empty(1, 2048))
        with FlopCounterMode(display=False) as forward:
            model(torch.empty(1, 16, 32, 32), torch.empty(1), text)
    assert forward.get_total_flops() == config.count_forward_flops(32, 32, 154)
    assert estimate_train_flops(config, 32, 32, 154) == 3 * forward.get_total_flops()
    assert config.count_parameters() == sum(p.numel() for p in model.parameters())
