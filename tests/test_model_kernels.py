"""The two operations whose gradients we write out for CPUs: as exact as torch's own, which they replace."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

from model.backbones.attention import SHORT, attend
from model.backbones.mmdit import MMDiTConfig
from model.backbones.norms import RMSNorm
from model.encoders.text import TextCond


def attention_case(queries: int, keys: int, *, masked: bool, gain: float) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """q, k, v (B, tokens, H, K), a gradient of the output, an additive bias; bfloat16."""
    g = torch.Generator().manual_seed(queries + keys)
    shapes = [(3, queries, 2, 64), (3, keys, 2, 64), (3, keys, 2, 64)]
    q, k, v = (torch.randn(shape, generator=g).bfloat16() for shape in shapes)
    hidden = torch.rand(3, 1, 1, keys, generator=g) < 0.3
    bias = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf).bfloat16() if masked else None
    return [gain * q, k, v], torch.randn(3, queries, 128, generator=g).bfloat16(), bias


def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias)
    return out.transpose(1, 2).flatten(2)


def results(function, qkv: list[Tensor], push: Tensor, bias: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients."""
    leaves = [x.to(dtype).requires_grad_() for x in (y.detach().clone() for y in qkv)]
    out = function(*leaves, None if bias is None else bias.to(dtype))
    return [out.detach(), *torch.autograd.grad(out, leaves, push.to(dtype))]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(96, 96), (64, 32), (SHORT, SHORT), (SHORT + 1, SHORT + 1)])
@pytest.mark.parametrize("gain", [1.0, 6.0])
def test_attention_in_bfloat16_is_as_exact_as_torchs(queries: int, keys: int, masked: bool, gain: float) -> None:
    """Distance to float64, also with logits of 20: at most a quarter more than the fused kernel's."""
    case = attention_case(queries, keys, masked=masked, gain=gain)
    exact = results(fused, *case, torch.float64)
    ours, theirs = (results(function, *case, torch.bfloat16) for function in (attend, fused))
    for one, other, truth in zip(ours, theirs, exact, strict=True):
        assert float((one - truth).norm()) <= 1.25 * float((other - truth).norm()) + 1e-3 * float(truth.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_torchs(dtype: torch.dtype) -> None:
    """On tokens and on queries as they lie in a fused qkv, forward bit for bit."""
    g = torch.Generator().manual_seed(0)
    queries = torch.randn(3, 5, 3, 2, 64, generator=g).to(dtype)[:, :, 0]
    norm, plain = RMSNorm(64, eps=1e-6).to(dtype), torch.nn.RMSNorm(64, eps=1e-6).to(dtype)
    close = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 1e-2}
    for x in (torch.randn(4, 64, generator=g).to(dtype), queries):
        found = []
        for module in (norm, plain):
            torch.nn.init.uniform_(module.weight, 0.5, 2, generator=torch.Generator().manual_seed(1))
            leaf = x.detach().clone().requires_grad_()
            out = module(leaf)
            push = torch.linspace(-1, 1, out.numel()).view(out.shape).to(dtype)
            found.append([out.detach(), *torch.autograd.grad(out, [leaf, module.weight], push)])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, **close)
        torch.testing.assert_close(found[0][0], found[1][0], atol=0, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6)


def test_rms_norm_gradients_are_derivatives() -> None:
    norm = RMSNorm(6, eps=1e-3).double()
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = norm.weight

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(function, (x, weight))
    assert norm(x.detach()).dtype == torch.float64


@pytest.mark.parametrize("qk_norm", [True, False])
def test_a_model_in_bfloat16_learns_as_one_in_float64(qk_norm: bool) -> None:
    config = MMDiTConfig(
        depth=3, in_channels=4, context_width=48, pooled_width=24, qk_norm=qk_norm, pos_max=12, pos_tokens=8, pos_base=8
    )
    g = torch.Generator().manual_seed(3)
    state = {n: 0.1 * torch.randn(x.shape, generator=g) + ("norm_" in n) for n, x in config.build().named_parameters()}
    x, t_B = torch.randn(4, 4, 16, 16, generator=g), torch.rand(4, generator=g)
    mask = torch.rand(4, 7, generator=g) < 0.7
    text = TextCond(torch.randn(4, 7, 48, generator=g), torch.randn(4, 24, generator=g), mask)
    gradients = []
    for dtype in (torch.float64, torch.bfloat16):
        model = config.build()
        model.load_state_dict(state)
        model.to(dtype)
        model(x.to(dtype), t_B, text.to(dtype=dtype)).double().square().mean().backward()
        gradients.append({name: p.grad.double() for name, p in model.named_parameters()})
    errors = {name: float((gradients[1][name] - exact).norm()) for name, exact in gradients[0].items()}
    for name, exact in gradients[0].items():
        # The text queries of the last block have the gradient 0.
        assert errors[name] <= 0.15 * float(exact.norm()) + 1e-6, name
    whole = sum(float(exact.square().sum()) for exact in gradients[0].values()) ** 0.5
    assert sum(error**2 for error in errors.values()) ** 0.5 <= 0.03 * whole


def test_compiled_blocks_leave_both_to_the_compiler() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    config = MMDiTConfig(
        depth=2, in_channels=4, context_width=48, pooled_width=24, pos_max=12, pos_tokens=8, pos_base=8
    )
    model = config.build().bfloat16()
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, fullgraph=True, dynamic=False, backend=counter)
    text = TextCond(torch.randn(2, 7, 48).bfloat16(), torch.randn(2, 24).bfloat16())
    model(torch.randn(2, 4, 16, 16).bfloat16(), torch.rand(2), text).float().square().mean().backward()
    assert counter.frame_count == 2
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    torch._dynamo.reset()
