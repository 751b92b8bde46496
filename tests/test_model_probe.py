"""The attention probe on known logits, and inside models: it sees every block and changes nothing."""

from __future__ import annotations

import math

import pytest
import torch

from model.backbones.mmdit import MMDiTConfig
from model.encoders.text import TextCond
from model.probe import AttentionProbe, measure_attention

CONFIG = MMDiTConfig(depth=3, in_channels=4, context_width=48, pooled_width=24, pos_max=12, pos_tokens=8, pos_base=8)


def test_figures_of_known_attention() -> None:
    """One query on two keys with logits 0 and log 3: shares 1/4 and 3/4."""
    q, k = torch.tensor([2.0]).view(1, 1, 1, 1), torch.tensor([0.0, math.log(3) / 2]).view(1, 1, 2, 1)
    seen = measure_attention(q, k)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert seen.max_logit == pytest.approx(math.log(3))
    assert seen.mean_entropy == pytest.approx(entropy)
    assert seen.entropy_share == pytest.approx(entropy / math.log(2))
    nothing = measure_attention(torch.zeros(2, 3, 5, 64), torch.zeros(2, 3, 7, 64))
    assert (nothing.max_logit, nothing.keys) == (0, 7)
    assert nothing.entropy_share == pytest.approx(1)


def test_masked_keys_do_not_count() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 5, 64, generator=g), torch.randn(2, 3, 7, 64, generator=g)
    bias = torch.zeros(2, 1, 1, 7)
    bias[..., 4:] = -torch.inf
    k[:, :, 4:] *= 100
    masked, cut = measure_attention(q, k, bias), measure_attention(q, k[:, :, :4])
    assert masked[:3] == pytest.approx(cut[:3], rel=1e-5)


@pytest.mark.parametrize("dual", [(), (0,)])
def test_the_probe_sees_each_attention_and_changes_nothing(dual: tuple[int, ...]) -> None:
    config = MMDiTConfig.from_json({**CONFIG.to_json(), "dual_attention": list(dual)})
    model, g = config.build(), torch.Generator().manual_seed(1)
    torch.nn.init.normal_(model.final.linear.weight, generator=g)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]).bool()
    text = TextCond(torch.randn(2, 6, 48, generator=g), torch.randn(2, 24, generator=g), mask)
    x, t_B = torch.randn(2, 4, 16, 16, generator=g), torch.rand(2, generator=g)
    plain = model(x, t_B, text)
    with AttentionProbe() as probe:
        assert torch.equal(model(x, t_B, text), plain)
    assert [seen.keys for seen in probe.seen] == ([70, 64, 70, 70] if dual else [70] * 3)
    # RMS-normalised queries and keys have length 8, so no logit exceeds 8 * 8 / 8.
    assert max(seen.max_logit for seen in probe.seen) <= 8 + 1e-4
    for block in model.blocks:
        block.image.qkv.norm_q.weight.data.mul_(5)
        block.text.qkv.norm_q.weight.data.mul_(5)
    with AttentionProbe() as louder:
        model(x, t_B, text)
    for before, after in zip(probe.seen, louder.seen, strict=True):
        if before.keys == 70:
            assert after.max_logit == pytest.approx(5 * before.max_logit, rel=1e-4)
            assert after.mean_entropy < before.mean_entropy
