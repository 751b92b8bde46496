"""What every backbone must keep: shapes, masks, checkpointing, JSON, and clean compilation of its blocks."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from data_pipeline.stages.buckets import list_buckets
from infra.errors import UserError
from model.backbone import BACKBONES, read_config
from model.backbones.norms import is_apex_available, make_layer_norm, make_rms_norm
from model.encoders.text import TextCond
from trainer.zero.engine import compile_blocks

SMALL = {
    "depth": 3,
    "in_channels": 4,
    "context_width": 48,
    "pooled_width": 24,
    "pos_max": 12,
    "pos_tokens": 8,
    "pos_base": 8,
}
NAMES = list(BACKBONES)


def small(name: str, **changes: object):
    extra = {"clip_tokens": 4} if name == "mmdit3" else {}
    return read_config(name, {**SMALL, **extra, **changes})


def random_model(name: str, **changes: object) -> nn.Module:
    model = small(name, **changes).build()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        nn.init.normal_(
            parameter, std=0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5, generator=generator
        )
    return model


def inputs(height: int = 16, width: int = 16) -> tuple[Tensor, Tensor, TextCond]:
    g = torch.Generator().manual_seed(3)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0]]).bool()
    text = TextCond(torch.randn(2, 7, 48, generator=g), torch.randn(2, 24, generator=g), mask)
    return torch.randn(2, 4, height, width, generator=g), torch.rand(2, generator=g), text


@pytest.mark.parametrize("name", NAMES)
def test_text_reaches_the_image_and_masked_text_does_not(name: str) -> None:
    model = random_model(name)
    x, t_B, text = inputs(12, 20)
    assert text.mask_BL is not None
    out = model(x, t_B, text)
    assert out.shape == x.shape
    noise = torch.randn(text.context_BLD.shape, generator=torch.Generator().manual_seed(5))
    hidden = torch.where(text.mask_BL[..., None], text.context_BLD, 50 * noise)
    torch.testing.assert_close(model(x, t_B, TextCond(hidden, text.pooled_BP, text.mask_BL)), out, atol=2e-5, rtol=1e-4)
    for other in (
        TextCond(noise, text.pooled_BP, text.mask_BL),
        TextCond(text.context_BLD, -text.pooled_BP, text.mask_BL),
        TextCond(text.context_BLD, text.pooled_BP),
    ):
        assert float((model(x, t_B, other) - out).detach().abs().max()) > 1e-3
    assert float((model(x, 1 - t_B, text) - out).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_each_sample_is_its_own(name: str) -> None:
    model = random_model(name)
    x, t_B, text = inputs()
    both = model(x, t_B, text)
    for row in range(2):
        rows = slice(row, row + 1)
        torch.testing.assert_close(model(x[rows], t_B[rows], text[rows]), both[rows], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_fresh_models_predict_zero(name: str) -> None:
    """What the zeros of DiT's initialisation are for."""
    x, t_B, text = inputs()
    assert float(small(name).build()(x, t_B, text).detach().abs().max()) == 0


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_no_gradient(name: str) -> None:
    model = random_model(name)
    x, t_B, text = inputs()
    gradients = []
    for model.checkpoint_blocks in (False, True):
        model.zero_grad()
        model(x, t_B, text).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("name", NAMES)
def test_configs_survive_json(name: str) -> None:
    config = small(name, qk_norm=False)
    assert read_config(config.name, config.to_json()) == config
    with pytest.raises(UserError, match="unknown"):
        read_config(name, {**SMALL, "colour": 1})
    with pytest.raises(UserError, match="depth is 0"):
        small(name, depth=0)
    with pytest.raises(UserError, match=r"channels"):
        config.build()(torch.zeros(2, 5, 16, 16), *inputs()[1:])
    with pytest.raises(UserError, match="15x16"):
        config.build()(torch.zeros(2, 4, 15, 16), *inputs()[1:])


def test_unknown_backbones_are_named() -> None:
    with pytest.raises(UserError, match="did you mean 'uvit'"):
        read_config("u-vit", SMALL)
    with pytest.raises(UserError, match="leaves no two parts"):
        read_config("mmdit3", {**SMALL, "clip_tokens": 7}).build()(*inputs())


@pytest.mark.parametrize("name", NAMES)
def test_blocks_compile_without_graph_breaks(name: str) -> None:
    """Every kind of block traces as one graph, and a table of shapes costs at most one compilation each."""
    torch._dynamo.reset()
    model = random_model(name, pos_max=16, **({"dual_attention": [0]} if name == "mmdit" else {}))
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    seen: set[type] = set()
    kept = []
    for index, block in enumerate(model.blocks):
        if type(block) not in seen:
            seen.add(type(block))
            kept.append(type(block).__name__)
            model.blocks[index] = torch.compile(block, fullgraph=True, dynamic=False, backend=counter)
    # The aspect buckets of 128 px, up to 1:4: nine shapes, some with equally many tokens, which share a graph.
    table = [tuple(int(side) // 8 for side in name.split("x")) for name in list_buckets(128, step=16, max_aspect=4.0)]
    tokens = {height * width // 4 for height, width in table}
    assert (len(table), len(tokens)) == (9, 4)
    for height, width in table + table[::-1]:
        model(*inputs(height, width))
    assert counter.frame_count == len(tokens) * len(kept)
    torch._dynamo.reset()


def test_a_real_bucket_table_stays_within_the_trainers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 px, up to 1:2: 19 shapes of 10 token counts, in training and in validation. torch's own limit is 8."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    table = [tuple(int(side) // 8 for side in name.split("x")) for name in list_buckets(512, step=16, max_aspect=2.0)]
    by_tokens = {height * width: (height, width) for height, width in table}
    assert (len(table), len(by_tokens)) == (19, 10)
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):  # puts the old ones back
        model = random_model("mmdit", depth=2, pos_max=64)
        compile_blocks(model)
        for height, width in by_tokens.values():
            model(*inputs(height, width))
            with torch.no_grad():
                model(*inputs(width, height))
    classes = {type(block) for block in model.blocks}
    assert counter.frame_count == 2 * len(by_tokens) * len(classes)
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where inductor keeps what it compiles: nothing of an earlier run, but headers and equal kernels once for all."""
    return tmp_path_factory.mktemp("kernels")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_blocks_compiled_by_inductor_compute_the_same(
    name: str, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real kernels of every kind of block, forward and backward (how many graphs shapes cost is counted above)."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(kernels))
    torch._dynamo.reset()
    model = random_model(name, depth=3 if name == "uvit" else 2)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        out = model(*inputs(12, 20))
        out.square().mean().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters())]

    plain, kinds = gradients(), {type(block) for block in model.blocks}
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, fullgraph=True, dynamic=False, backend=counter)
    for ours, theirs in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()) + 1e-6, rtol=1e-4)
    assert counter.frame_count == len(kinds)
    torch._dynamo.reset()


@pytest.mark.skipif(not is_apex_available(), reason="NVIDIA apex with its CUDA kernels is not installed")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="apex's fused kernels run on CUDA tensors only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apex_norms_equal_torchs(dtype: torch.dtype) -> None:
    """Outputs and gradients of both norms, on contiguous tokens and on queries as they lie in a fused qkv."""
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    generator = torch.Generator("cuda").manual_seed(0)
    tokens = torch.randn(3, 5, 64, device="cuda", dtype=dtype, generator=generator)
    queries = torch.randn(3, 5, 3, 2, 64, device="cuda", dtype=dtype, generator=generator)[:, :, 0]
    push = torch.randn(queries.shape, device="cuda", dtype=dtype, generator=generator)
    for make in (make_rms_norm, make_layer_norm):
        for x, weight in ((tokens, push[:, :, 0]), (queries, push)):
            results = []
            for backend in ("torch", "apex"):
                norm, leaf = make(64, backend).to("cuda", dtype), x.detach().requires_grad_()
                for parameter in norm.parameters():
                    parameter.data.copy_(torch.linspace(0.5, 2, 64))
                out = norm(leaf)
                (out * weight).sum().backward()
                results.append([out, leaf.grad, *(p.grad for p in norm.parameters())])
            assert len(results[0]) == (3 if make is make_rms_norm else 2)
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs, **close)


@pytest.mark.skipif(is_apex_available(), reason="apex is installed here")
def test_asking_for_absent_apex_is_an_error() -> None:
    with pytest.raises(UserError, match="not installed"):
        small("mmdit", norm_backend="apex").build()
