"""The model package on a GPU against itself on the CPU. For a dry run without one, set DEVICE to "cpu"."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from model_files import DUAL, META, write_vae
from model_kinds import KINDS
from test_model_text import CAPTIONS, write_clip, write_t5
from torch import Tensor, nn

from data_pipeline.loading.batch import LatentBatch
from infra.errors import UserError
from model.backbone import BACKBONES, read_config
from model.backbones.norms import is_apex_available, make_rms_norm
from model.diffusion.flow import FORMULATIONS, get_formulation
from model.diffusion.sampler import solve
from model.diffusion.validation import compute_validation_losses
from model.encoders.networks import load_text_encoders
from model.encoders.text import EncoderSpec, TextCond, TextSpec
from model.encoders.vae import Latents, load_vae
from model.files.weights import load_model, save_weights
from model.lora import add_adapters, is_adapter, switch_off_adapters
from model.probe import AttentionProbe
from model.seeding import keyed_normal, keyed_uniform
from trainer.feed import draw_noise
from trainer.objective import pretrain
from trainer.zero.engine import compile_blocks

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
WORLD = Path(__file__).parent.parent / "data_pipeline" / "world" / "checkpoints"
SIZE = {"in_channels": 4, "context_width": 48, "pooled_width": 24, "pos_max": 12, "pos_tokens": 8, "pos_base": 8}
CHANGES = {"mmdit/plain": {"qk_norm": False}, "mmdit/dual": {"dual_attention": [0]}, "mmdit3": {"clip_tokens": 4}}
NAMES = [*BACKBONES, *(name for name in CHANGES if name not in BACKBONES)]
# Latents and text: 60 + 7, 15 + 9 (the text's part of a bias row of 24 is not aligned to 16 bytes), 64 + 8 tokens.
SHAPES = [(12, 20, 7), (6, 10, 9), (16, 16, 8)]
DTYPES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """No TF32 in convolutions either: float32 has 24 bits here as it has on a CPU."""
    torch.set_num_threads(1)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def randomise(parameters: Mapping[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(2)
    for p in parameters.values():
        nn.init.normal_(p, std=0.1 if p.ndim == 1 else p[0].numel() ** -0.5, generator=generator)


def build(name: str, device: str = DEVICE, dtype: torch.dtype = torch.float32, depth: int = 3) -> nn.Module:
    model = read_config(name.split("/")[0], {**SIZE, "depth": depth, **CHANGES.get(name, {})}).build()
    randomise(dict(model.named_parameters()))
    return model.to(device, dtype)


def inputs(shape: tuple[int, int, int] = SHAPES[0], masked: bool = True) -> tuple[Tensor, Tensor, TextCond]:
    height, width, tokens = shape
    g = torch.Generator().manual_seed(3)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 0, 0, 0, 0]]).bool()[:, :tokens]
    text = TextCond(torch.randn(2, tokens, 48, generator=g), torch.randn(2, 24, generator=g), mask if masked else None)
    return torch.randn(2, 4, height, width, generator=g), torch.rand(2, generator=g), text


def passes(model: nn.Module, case: tuple[Tensor, Tensor, TextCond]) -> Mapping[str, Tensor]:
    """Output (under "") and the gradient of each parameter that has one, in float64 on the CPU."""
    (x, t_B, text), like = case, next(model.parameters())
    model.zero_grad()
    out = model(x.to(like), t_B.to(like.device), text.to(like.device, like.dtype))
    out.double().square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: x.detach().cpu().double() for name, x in {"": out, **gradients}.items()}


@functools.cache
def exact(name: str, shape: tuple[int, int, int], masked: bool) -> Mapping[str, Tensor]:
    return passes(build(name, "cpu", torch.float64), inputs(shape, masked))


def assert_near(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> None:
    assert float(other.norm()) > 0
    assert float((one.cpu().double() - other.cpu().double()).norm() / other.double().norm()) <= tolerance


def assert_alike(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Output, and in float32 each gradient, in bfloat16 all together. Some vanish: a trace of the whole is allowed."""
    assert found.keys() == wanted.keys()
    assert_near(found[""], wanted[""], DTYPES[dtype])
    ours, theirs = (torch.cat([x.flatten() for name, x in r.items() if name]) for r in (found, wanted))
    assert_near(ours, theirs, 2 * DTYPES[dtype])
    for name, x in wanted.items() if dtype == torch.float32 else ():
        assert float((found[name] - x).norm()) <= 1e-4 * float(x.norm()) + 1e-6 * float(theirs.norm()), name


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_backbones_compute_what_they_do_on_the_cpu(name: str, shape: tuple[int, int, int], masked: bool) -> None:
    for dtype in DTYPES:
        model = build(name, dtype=dtype)
        for model.checkpoint_blocks in (False, True):
            assert_alike(passes(model, inputs(shape, masked)), exact(name, shape, masked), dtype)


COMPILED = [("mmdit/dual", dtype, masked) for dtype in DTYPES for masked in (True, False)]
COMPILED += [(name, torch.bfloat16, True) for name in BACKBONES if name != "mmdit"] + [("mmdit", torch.float32, True)]


@pytest.mark.parametrize(("name", "dtype", "masked"), COMPILED)
def test_compiled_blocks_compute_the_same(name: str, dtype: torch.dtype, masked: bool) -> None:
    torch._dynamo.reset()
    model = build(name, dtype=dtype, depth=3 if name == "uvit" else 2)
    eager = passes(model, inputs(masked=masked))
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):  # puts the old ones back
        compile_blocks(model)
        found = passes(model, inputs(masked=masked))
    torch._dynamo.reset()
    assert_alike(found, eager, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_its_formula_and_apexs_is_refused(dtype: torch.dtype) -> None:
    x, push = torch.randn(2, 3, 5, 3, 2, 64, generator=torch.Generator().manual_seed(0)).to(dtype)[:, :, :, 0]
    norm = make_rms_norm(64).to(DEVICE, dtype)
    nn.init.uniform_(norm.weight, 0.5, 2)
    leaf, wide, weight = (y.detach().requires_grad_() for y in (x.to(DEVICE), x.double(), norm.weight.cpu().double()))
    out, formula = norm(leaf), wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    assert_near(out.detach(), formula.detach(), DTYPES[dtype] / 2)
    ours = torch.autograd.grad(out, [leaf, norm.weight], push.to(DEVICE))
    for one, other in zip(ours, torch.autograd.grad(formula, [wide, weight], push.double()), strict=True):
        assert_near(one, other, DTYPES[dtype] / 2)
    if not is_apex_available():
        with pytest.raises(UserError, match="norm_backend=apex"):
            make_rms_norm(64, "apex")


def test_noise_and_times_of_a_seed_are_drawn_on_the_cpu() -> None:
    draw = lambda at: (keyed_normal(1, at, "noise", (4, 8)), keyed_uniform(1, at, "timestep"))  # noqa: E731
    plain = draw([3, 4])
    with torch.device(DEVICE):
        found = draw(torch.tensor([3, 4]))
    assert all(other.is_cpu and torch.equal(one, other) for one, other in zip(plain, found, strict=True))


def test_building_a_model_leaves_the_gpus_generator_alone() -> None:
    before = torch.cuda.get_rng_state()
    add_adapters(DUAL.build(seed=5), rank=2, alpha=2.0, seed=6)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("name", FORMULATIONS)
def test_losses_and_conversions_are_those_of_the_cpu(name: str) -> None:
    form, (x, t_B, text), places, found = get_formulation(name), inputs(), torch.tensor([5, 9]), []
    predict = lambda z, t_B, text: 0.5 * z + t_B.view(-1, 1, 1, 1)  # noqa: E731
    for device in map(torch.device, ("cpu", DEVICE)):
        batch = LatentBatch(x, text, places, [], [])
        micro = draw_noise(batch, form, seed=1, shift=2.0)
        losses = pretrain(predict, micro.to(device), formulation=form)
        batch = LatentBatch(x.to(device), text.to(device), places, [], [])
        levels = compute_validation_losses(predict, batch, (0.25, 0.75), 1, formulation=form)
        times = form.draw_timesteps(t_B.to(device), 2.0)
        sample = form.sample(x.to(device), x.flip(1).to(device), times)
        parts = [part(sample.target, sample.x_t, times) for part in (form.to_x0, form.to_noise, form.to_velocity)]
        found.append([micro.t_B, losses.loss_B, levels, times, sample.x_t, sample.target, *parts])
    assert torch.equal(found[0][0], found[1][0])
    for cpu, gpu in zip(*found, strict=True):
        assert_near(gpu, cpu, 1e-4)


@pytest.mark.parametrize("solver", ["euler", "heun", "rk"])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore:t is not on the same device")  # torchdiffeq, which moves it
def test_samplers_end_where_they_do_on_the_cpu(name: str, solver: str) -> None:
    """From the same noise, with guidance and a shift; rk with a smooth function, of which it takes few steps."""
    found, kwargs = [], {"guidance": 2.0, "shift": 2.0, "steps": 5, "solver": solver, "formulation": name}
    smooth = lambda z, t_B, text: torch.sin(z + (t_B + text.pooled_BP.mean(1)).view(-1, 1, 1, 1))  # noqa: E731
    for device, dtype in (("cpu", torch.float64), (DEVICE, torch.float32)):
        noise, text = inputs()[0].to(device, dtype), inputs()[2].to(device, dtype)
        predict = smooth if solver == "rk" else build("mmdit", device, dtype)
        found.append(solve(predict, noise, text, text.zeros_like(), **kwargs))
    assert found[0].evaluations == found[1].evaluations
    for part in ("latents", "path_length_B", "displacement_B"):
        assert_near(*(getattr(one, part) for one in found[::-1]), 1e-3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("which", ["world", "tiny"])
def test_autoencoders_compute_what_they_do_on_the_cpu(which: str, layout: torch.memory_format, tmp_path: Path) -> None:
    vae = load_vae(WORLD / "vae" if which == "world" else write_vae(tmp_path / "vae"))
    latents = Latents.of(vae.config, "vae")
    x = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = latents.encode(vae, x)
    noise = keyed_normal(0, [0, 1], "", moments[0, : latents.channels].shape)
    z = latents.normalise(latents.sample(moments, noise))
    images = latents.decode(vae, z)
    vae.to(DEVICE, memory_format=layout)
    assert_near(latents.encode(vae, x.to(DEVICE)), moments, 1e-3)  # of float16
    assert_near(latents.sample_normalised_(noise.to(DEVICE), moments.to(DEVICE).float()), z, 1e-5)
    assert_near(latents.decode(vae, z.to(DEVICE)), images)


@pytest.mark.parametrize("layout", ["padded", "trimmed"])
def test_text_encoders_compute_what_they_do_on_the_cpu(layout: str, tmp_path: Path) -> None:
    write_clip(tmp_path / "gg", 24, 20, "!")
    write_t5(tmp_path / "t5", 160)
    clip_l = EncoderSpec("clip_l", str(WORLD / "clip"), "open_clip", 16, 128, 128)
    clip_g, t5 = EncoderSpec("clip_g", "gg", "clip_hf", 8, 24, 20), EncoderSpec("t5", "t5", "t5_hf", 10, 160, 0)
    spec = TextSpec((clip_l, clip_g, t5), layout, 160)
    cpu, gpu = (load_text_encoders(spec, tmp_path.joinpath, device=d).condition(CAPTIONS) for d in ("cpu", DEVICE))
    assert_near(gpu.context_BLD, cpu.context_BLD, 1e-5)
    assert_near(gpu.pooled_BP, cpu.pooled_BP, 1e-5)
    assert gpu.mask_BL is cpu.mask_BL is None or torch.equal(gpu.mask_BL, cpu.mask_BL)


def test_adapters_compute_what_they_do_on_the_cpu() -> None:
    model = build("mmdit", "cpu")
    add_adapters(model, rank=4, alpha=6.0, seed=1)
    randomise({name: p for name, p in model.named_parameters() if is_adapter(name)})
    wanted = passes(copy.deepcopy(model).double(), inputs())
    assert_alike(passes(model.to(DEVICE), inputs()), wanted, torch.float32)
    assert all(is_adapter(name) for name in wanted if name)
    with switch_off_adapters(model):
        assert_near(passes(model.requires_grad_(), inputs())[""], exact("mmdit", SHAPES[0], True)[""])


@pytest.mark.parametrize("name", NAMES)
def test_the_probe_sees_what_it_does_on_the_cpu(name: str) -> None:
    seen = []
    for device in ("cpu", DEVICE):
        with AttentionProbe() as probe:
            passes(build(name, device), inputs())
        seen.append(probe.seen)
    assert len(seen[0]) == len(seen[1]) > 2
    for cpu, gpu in zip(*seen, strict=True):
        assert tuple(gpu) == pytest.approx(tuple(cpu), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_saved_from_a_gpu_load_on_the_cpu_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model = DUAL.build().to(DEVICE, dtype)
    file = save_weights(tmp_path / "ema.safetensors", model.state_dict(), {**META, "config": DUAL.to_json()})
    loaded = load_model(file, dtype=dtype)[0].state_dict()
    assert all(x.is_cpu and x.dtype == dtype and torch.equal(model.state_dict()[n].cpu(), x) for n, x in loaded.items())
