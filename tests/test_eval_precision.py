"""bf16 as sampling uses it: the packed network against the plain one, and a protocol that says which was used."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_eval_run import export
from torch import nn

from eval.drawing.generate import ImageRequest, Painter, Sampling
from eval.protocol import hash_protocol
from eval.run import RunOptions, run, settle
from eval.service.worker import EvaluationSettings
from infra.errors import UserError
from model.backbone import BACKBONES
from model.backbones.layers import MLP
from model.bfloat16 import PackedLinear, PackedMLP, QuickRMSNorm, convert_to_bfloat16, pack
from model.encoders.text import TextCond

PACKED = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bf16 products: nothing is packed on it"
)


def network(name: str) -> nn.Module:
    more = {"clip_tokens": 4} if name == "mmdit3" else {}
    model = BACKBONES[name](depth=2, in_channels=8, context_width=96, pooled_width=32, pos_max=16, **more).build()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def inputs():
    generator = torch.Generator().manual_seed(1)
    text = TextCond(
        torch.randn(3, 9, 96, generator=generator),
        torch.randn(3, 32, generator=generator),
        torch.arange(9)[None] < torch.tensor([[9], [5], [7]]),
    )
    return torch.randn(3, 8, 8, 8, generator=generator), torch.tensor([0.1, 0.5, 0.9]), text


def distance(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.mark.parametrize("name", BACKBONES)
@torch.inference_mode()
def test_the_packed_network_is_as_far_from_fp32_as_plain_bf16(name):
    model, (x, t, text) = network(name), inputs()
    exact = model(x, t, text)
    plain = network(name).bfloat16()(x.bfloat16(), t, text.to(dtype=torch.bfloat16))
    ours = convert_to_bfloat16(model)(x, t, text)
    assert ours.dtype == torch.float32
    assert distance(plain, exact) > 1e-3
    assert distance(ours, exact) < 1.3 * distance(plain, exact)
    assert torch.equal(model(x, t, text), exact), "the float32 network was changed"


@PACKED
@torch.inference_mode()
def test_packed_layers_give_what_they_replace():
    torch.manual_seed(0)
    x = torch.randn(2, 7, 64).bfloat16()
    linear, mlp, norm = nn.Linear(64, 32).bfloat16(), MLP(64).bfloat16(), nn.RMSNorm(64, eps=1e-6).bfloat16()
    norm.weight.data += torch.randn(64).bfloat16()
    for layer, quick in ((linear, PackedLinear(linear)), (mlp, PackedMLP(mlp)), (norm, QuickRMSNorm(norm))):
        torch.testing.assert_close(quick(x), layer(x), rtol=2e-2, atol=2e-2)
        part = x[:, 2:5]  # a slice of joined streams is not contiguous
        torch.testing.assert_close(quick(part), layer(part), rtol=2e-2, atol=2e-2)
    assert torch.equal(QuickRMSNorm(norm)(torch.zeros(1, 64).bfloat16()), torch.zeros(1, 64).bfloat16())


@PACKED
def test_no_layer_is_left_unpacked():
    model = network("mmdit").bfloat16()
    pack(model)
    kinds = {type(module) for module in model.modules()}
    assert {PackedLinear, PackedMLP, QuickRMSNorm} < kinds
    assert not kinds & {nn.Linear, MLP, nn.RMSNorm}
    assert not any(isinstance(module, nn.Linear) for module in model.modules())


def test_auto_is_resolved_before_a_protocol_names_it(tmp_path, best_on_cpu):
    fp32, bf16 = Sampling(precision="fp32"), Sampling(precision="bf16")
    assert "precision" not in fp32.protocol(), "hashes of rows measured before there was a choice must stay"
    assert bf16.protocol() == fp32.protocol() | {"precision": "bf16"}
    assert hash_protocol(bf16.protocol()) != hash_protocol(fp32.protocol())
    for best in ("bf16", "fp32"):
        best_on_cpu(best)
        assert Sampling(device="cpu").resolve().protocol() == Sampling(precision=best).protocol()
    with pytest.raises(ValueError, match="a protocol needs a precision"):
        Sampling().protocol()
    for device, refused in (
        ("cudaa", "unknown --device 'cudaa': expected auto, cpu, cuda"),
        ("cuda:99", "--device cuda:99 cannot"),
    ):
        with pytest.raises(UserError, match=refused):
            run(RunOptions("nowhere", sampling=Sampling(device=device)))
    with pytest.raises(UserError, match="no checkpoints under"):  # the workers' machines may have one
        run(RunOptions(str(tmp_path), sampling=Sampling(device="cuda"), workers=2))


@pytest.mark.parametrize(("first", "second"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_all_evaluations_of_some_runs_compute_in_what_the_first_one_chose(tmp_path, best_on_cpu, caplog, first, second):
    """Machines and devices come and go; rows, claims and protocols of `auto` stay those of the first evaluation."""
    runs = str(tmp_path / "runs")
    best_on_cpu(first)
    begun = settle(RunOptions(runs, sampling=Sampling(device="cpu")))
    assert begun.sampling.precision == first
    best_on_cpu(second)
    for later in (
        RunOptions(runs), RunOptions(runs, sampling=Sampling(batch=2, device="cuda"), workers=2),
        RunOptions(runs, workers=2, gpus_per_worker=0.5),
    ):  # fmt: skip
        settled = settle(later)
        assert settled.sampling.protocol() == begun.sampling.protocol()
        assert EvaluationSettings(settled).hash == EvaluationSettings(begun).hash
    asked = settle(RunOptions(runs, sampling=Sampling(precision=second, device="cpu")))
    assert asked.sampling.precision == second, "who asks for another precision gets it, under another protocol"
    assert settle(RunOptions(str(tmp_path / "others"), sampling=Sampling(device="cpu"))).sampling.precision == second
    kept = tmp_path / "runs" / "results" / "precision.json"
    kept.write_text("{")
    with pytest.raises(UserError, match=r"precision.json is not JSON .*: give --precision fp32 or bf16"):
        settle(RunOptions(runs))


def test_workers_compute_on_what_they_are_given(tmp_path):
    device = {
        gpus: settle(RunOptions(str(tmp_path / "runs"), workers=1, gpus_per_worker=gpus)).sampling.device
        for gpus in (0, 0.25, 1)
    }
    assert device == {0: "cpu", 0.25: "cuda", 1: "cuda"}
    assert settle(RunOptions(str(tmp_path / "runs"), workers=1)).official.device == "cpu"


def test_bf16_pictures_are_those_of_fp32_but_for_rounding(tmp_path):
    painter = Painter(export(tmp_path / "ema.safetensors"))
    jobs = [ImageRequest("a red dog", number=n) for n in range(4)]
    quick = Sampling(steps=3, guidance=2.0, batch=4)
    exact, rounded, alone = (
        np.stack([image for _, image in painter.paint(jobs, replace(quick, **way))]).astype(int)
        for way in ({"precision": "fp32"}, {"precision": "bf16"}, {"precision": "bf16", "batch": 1})
    )
    assert (exact != rounded).any()
    assert np.abs(exact - rounded).mean() < 2
    assert np.abs(alone - rounded).mean() < 0.5, "nor does the batch matter more than rounding"
