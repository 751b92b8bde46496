"""Post-hoc EMA: inner products by integration, a profile of itself, and averages of a known path."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from infra.errors import UserError
from model.backbones.mmdit import MMDiTConfig
from model.files.weights import load_weights
from trainer.exports.export import Weights, write
from trainer.exports.posthoc import Profile, combine_profiles, compute_overlap, reconstruct
from trainer.recipes import get_recipe
from trainer.runfolder import get_checkpoints_folder, name_step
from trainer.zero import checkpoint
from trainer.zero.ema import ShardedEMA, solve_gamma
from trainer.zero.group import Group
from trainer.zero.partition import Segment

SOLO = Group(0, 1, torch.device("cpu"))
NARROW, WIDE = solve_gamma(0.05), solve_gamma(0.10)
CONFIG = MMDiTConfig(depth=1, in_channels=4, context_width=48, pooled_width=32)
BATCH, STEPS, SAVED = 10, 800, 100


@pytest.mark.parametrize(
    ("a", "b"), itertools.combinations([Profile(NARROW, 100.0), Profile(WIDE, 100.0), Profile(WIDE, 60.0)], 2)
)
def test_overlap_against_integration_and_against_the_papers_form(a, b):
    def density(t: float, p: Profile) -> float:
        return (p.gamma + 1) * t**p.gamma / p.images ** (p.gamma + 1)

    expected, _ = quad(lambda t: density(t, a) * density(t, b), 0, min(a.images, b.images))
    assert compute_overlap(a, b) == pytest.approx(expected, rel=1e-8)
    # Algorithm 3 of EDM2: (g_a + 1)(g_b + 1) (t_a / t_b)^(g_b or -g_a) / ((g_a + g_b + 1) max(t_a, t_b)).
    power = b.gamma if a.images < b.images else -a.gamma
    form = (a.gamma + 1) * (b.gamma + 1) * (a.images / b.images) ** power
    form /= (a.gamma + b.gamma + 1) * max(a.images, b.images)
    assert compute_overlap(a, b) == pytest.approx(form, rel=1e-12)


def test_a_stored_profile_is_itself_and_a_missing_one_is_told_by_its_error():
    stored = [Profile(gamma, t) for gamma in (NARROW, WIDE) for t in (25.0, 50.0, 75.0, 100.0)]
    weights, error = combine_profiles(stored, stored[-1])
    np.testing.assert_allclose(weights, np.eye(8)[-1], atol=1e-9)
    assert error < 1e-7
    assert combine_profiles(stored, Profile(solve_gamma(0.07), 100.0))[1] < 0.05
    assert combine_profiles(stored[:2], Profile(solve_gamma(0.07), 100.0))[1] > 0.5


def walk():
    """(images seen, masters): a path of weights that bends, with noise."""
    generator = torch.Generator().manual_seed(0)
    start = torch.cat([p.detach().reshape(-1) for p in CONFIG.build(seed=1).parameters()])
    position = torch.zeros_like(start)
    for step in range(1, STEPS + 1):
        position += 0.02 * torch.randn(start.shape, generator=generator)
        yield step * BATCH, start + math.sin(step / 150) + position


def unflatten(flat: torch.Tensor) -> dict[str, torch.Tensor]:
    model = CONFIG.build(seed=1)
    torch.nn.utils.vector_to_parameters(flat, model.parameters())
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run that stores what training stores, and what its averages of other widths would have been."""
    folder, profiles = tmp_path_factory.mktemp("posthoc"), ("power:0.1", "power:0.05")
    recipe = get_recipe("world-d1")
    state = recipe.to_json() | {"ema": {"profiles": list(profiles)}, "lora": {"rank": None, "alpha": None}}
    path = list(walk())
    ema = ShardedEMA(profiles, [path[0][1]])
    others = ShardedEMA(("power:0.07", "power:0.15"), [path[0][1]])
    segments, at = [], 0
    for name, p in CONFIG.build().named_parameters():
        segments.append(Segment(name, tuple(p.shape), 0, p.numel(), at))
        at += p.numel()
    for images, master in path:
        for each in (ema, others):
            each.update([master], images, BATCH)
        step = images // BATCH
        if step % SAVED == 0:
            values = unflatten(ema.first[0])
            meta = {"kind": "ema", "backbone": "mmdit", "config": CONFIG.to_json(), "images_seen": images}
            meta |= {"ema_profile": profiles[0], "shift": 1.0}
            shapes = {name: tuple(tensor.shape) for name, tensor in values.items()}
            uri = folder / "weights" / name_step(step) / "ema.safetensors"
            write([str(uri)], Weights(shapes, values.__getitem__, meta))
            tensors = {f"ema/{name}": ema.shards[name] for name in profiles}
            checkpoint.save(
                get_checkpoints_folder(str(folder)), checkpoint.RankShare([tuple(segments)], tensors), SOLO, step=step,
                state={"recipe": state, "images_seen": images}, keep=8,
            )  # fmt: skip
    return folder, {name: others.shards[f"power:{name}"][0] for name in ("0.07", "0.15")}


@pytest.mark.parametrize("width", ["0.07", "0.15"])
def test_the_average_of_another_width_is_nearly_what_it_would_have_been(run, tmp_path, width):
    folder, wanted = run
    error = reconstruct(str(folder), float(width), out=str(tmp_path / "w.safetensors"))
    found, meta = load_weights(tmp_path / "w.safetensors")
    flat = torch.cat([found[name].reshape(-1) for name, _ in CONFIG.build().named_parameters()])
    exported, _ = load_weights(folder / "weights" / name_step(STEPS) / "ema.safetensors")
    stored = torch.cat([exported[name].reshape(-1) for name, _ in CONFIG.build().named_parameters()])
    off = (flat - wanted[width]).norm() / (stored - wanted[width]).norm()
    assert off < 0.05  # of the distance to the stored average
    assert error < 0.05
    assert (meta["ema_profile"], meta["images_seen"]) == (f"power:{float(width)}", STEPS * BATCH)
    assert meta["posthoc"]["averages"] == 16


def test_a_stored_average_comes_back(run, tmp_path):
    folder, _ = run
    reconstruct(str(folder), 0.1, out=str(tmp_path / "w.safetensors"))
    found, _ = load_weights(tmp_path / "w.safetensors")
    exported, _ = load_weights(folder / "weights" / name_step(STEPS) / "ema.safetensors")
    assert found.keys() == exported.keys()
    for name, tensor in exported.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5)


def test_the_command_and_what_it_refuses(run, tmp_path, capsys):
    folder, _ = run
    words = [sys.executable, "-m", "trainer", "posthoc", str(folder), "--std", "0.07", "--images", "4000"]
    done = subprocess.run([*words, "--dtype", "bf16"], capture_output=True, text=True, check=True)
    out = folder / "weights" / "posthoc_0.07.safetensors"
    assert done.stdout.startswith(f"{out}: power:0.07, error of its profile ")
    assert load_weights(out)[1]["images_seen"] == 4000
    with pytest.raises(UserError, match="no averages in"):
        reconstruct(str(tmp_path), 0.07, out=str(tmp_path / "w"))
    with pytest.raises(UserError, match="no average was stored in the first 5 images"):
        reconstruct(str(folder), 0.07, out=str(tmp_path / "w"), images=5)
    with pytest.raises(UserError, match=r"stored its last average after 8,000 images"):
        reconstruct(str(folder), 0.07, out=str(tmp_path / "w"), images=8001)
    with pytest.raises(UserError, match=r"power:0\.5"):
        reconstruct(str(folder), 0.5, out=str(tmp_path / "w"))
    reconstruct(str(folder), 0.02, out=str(tmp_path / "w"), images=1000)  # narrower than all that was stored
    assert "store more of them" in capsys.readouterr().err
