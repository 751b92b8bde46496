"""Diffusion-DPO: ln 2 at the start, an independent formula, what trains, rising margins, refusals, whole runs."""

import contextlib
import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from test_model_lora import CONFIG, build
from trainer_dpo_checks import VARIANTS
from trainer_launch import TINY, read_figure, run_ranks

from data_pipeline.loading.loader import open_dataset
from data_pipeline.loading.pairs import RejectedLatents
from data_pipeline.packing.synthetic import write_synthetic
from infra.errors import UserError
from infra.results import ResultStore
from model.diffusion.flow import get_formulation
from model.files.weights import load_weights, read_meta, save_weights
from model.lora import add_adapters, is_adapter, merge_files, switch_off_adapters
from model.seeding import keyed_normal, keyed_uniform
from trainer.__main__ import main
from trainer.checks.preflight import set_init_weights
from trainer.checks.values import check_values
from trainer.exports.adapter import DIFFUSERS_ADAPTER
from trainer.feed import draw_noise
from trainer.objective import check_objective, prefer
from trainer.planning.hardware_plan import make_hardware_plan
from trainer.recipe import DPO, LoRA, Recipe
from trainer.recipes import get_recipe

FORM = get_formulation("rf/lognorm(0.00,1.00)")
CPU = torch.device("cpu")


class Plain:
    """One network with adapters, in the seat of the engine."""

    def __init__(self, *, scale: float = 0.0, rank: int = 4) -> None:
        self.model = build()
        add_adapters(self.model, rank=rank, alpha=rank)
        with torch.no_grad():
            for name, param in self.model.named_parameters():
                if name.endswith(".lora.b") and scale:
                    param.copy_(scale * torch.randn(param.shape, generator=torch.Generator().manual_seed(2)))

    def __call__(self, *given):
        return self.model(*given).float()

    @contextlib.contextmanager
    def reference(self):
        with torch.no_grad(), switch_off_adapters(self.model):
            yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pairs")
    write_synthetic(
        str(path), num_samples=64, val_samples=16, latent_shape=(4, 8, 8), buckets=("32x32",), pairs=True, shard_rows=24
    )
    return path


@pytest.fixture(scope="module")
def batch(data):
    dataset = open_dataset(str(data))
    batches = dataset.batches(seed=0, global_batch=8, encoder_dropout=0.0, read_rejected=RejectedLatents(dataset))
    found = next(batches)
    batches.close()
    return found


def losses(policy, batch, beta=100.0):
    micro = draw_noise(batch, FORM, seed=3, shift=1.0)
    return prefer(policy, micro.to(CPU), formulation=FORM, beta=beta)


def test_the_loss_starts_at_ln_2_exactly(batch):
    found = losses(Plain(), batch, beta=5000.0)
    assert found.loss_B.tolist() == [torch.tensor(2.0).log().item()] * 8
    assert found.figures["dpo/accuracy"].tolist() == [0.5] * 8
    assert not found.figures["dpo/reward_margin"].any()


def test_the_loss_against_the_formula_in_numpy(batch):
    """-log sigmoid(-beta/2 ((lw - ll) - (rw - rl))), pair by pair, with noise and time drawn once for both."""
    policy, beta = Plain(scale=0.3), 40.0
    found = losses(policy, batch, beta)
    assert found.loss_B.std() > 1e-3
    noise = keyed_normal(3, batch.positions, "noise", batch.latent_BCHW.shape[1:]).numpy()
    t = 1 / (1 + np.exp(-_normal_quantile(keyed_uniform(3, batch.positions, "timestep").numpy())))
    for i in range(8):
        errors = {}
        for name, image in (("w", batch.latent_BCHW[i]), ("l", batch.rejected_BCHW[i])):
            x0 = image.numpy()
            x_t = torch.from_numpy((1 - t[i]) * x0 + t[i] * noise[i]).float()[None]
            with torch.no_grad():
                given = x_t, torch.tensor([t[i]]).float(), batch.text[i : i + 1]
                mine = policy(*given)[0].numpy()
                with policy.reference():
                    reference = policy(*given)[0].numpy()
            velocity = noise[i] - x0
            errors[name] = np.mean((mine - velocity) ** 2), np.mean((reference - velocity) ** 2)
        (lw, rw), (ll, rl) = errors["w"], errors["l"]
        expected = np.log1p(np.exp(beta / 2 * ((lw - ll) - (rw - rl))))
        assert found.loss_B[i].item() == pytest.approx(expected, rel=2e-3)
        assert draw_noise(batch, FORM, seed=3, shift=1.0).t_B[i].item() == pytest.approx(t[i], rel=1e-6)


def _normal_quantile(u: np.ndarray) -> np.ndarray:
    from statistics import NormalDist

    return np.array([NormalDist().inv_cdf(value) for value in u])


def test_gradients_reach_adapters_only_and_the_reference_stays(batch):
    policy = Plain(scale=0.1)
    losses(policy, batch).loss_B.mean().backward()
    for name, param in policy.model.named_parameters():
        assert (param.grad is not None and param.grad.any().item()) is is_adapter(name), name
    before = build()
    assert all(torch.equal(p, dict(policy.model.named_parameters())[n]) for n, p in before.named_parameters())


def test_training_raises_the_margin_on_its_pairs(batch):
    policy = Plain()
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)
    seen = []
    for _ in range(15):
        found = losses(policy, batch)
        optimizer.zero_grad()
        found.loss_B.mean().backward()
        optimizer.step()
        seen.append((found.loss_B.mean().item(), found.figures["dpo/reward_margin"].mean().item()))
    assert seen[-1][0] < 0.5 * math.log(2)
    assert seen[-1][1] > 1.0
    after = losses(policy, batch)
    assert after.figures["dpo/accuracy"].mean() == 1.0


def test_a_batch_without_pairs_is_refused(batch):
    with pytest.raises(UserError, match="needs pairs"):
        losses(Plain(), batch._replace(rejected_BCHW=None))


@pytest.mark.parametrize(
    ("question", "changes", "says"),
    [
        (check_objective, {"objective": "dpo"}, "give --lora.rank"),
        (check_objective, {"objective": "dop"}, r"unknown objective 'dop' .did you mean 'dpo'"),
        (check_values, {"lora": LoRA(rank=0)}, "lora.rank is 0"),
        (check_values, {"lora": LoRA(rank=4, alpha=-1.0)}, "lora.alpha"),
        (check_values, {"objective": "dpo", "lora": LoRA(rank=4), "dpo": DPO(beta=0.0)}, "dpo.beta"),
    ],
)
def test_recipes_that_cannot_work_are_refused(question, changes, says):
    with pytest.raises(UserError, match=says):
        question(dataclasses.replace(get_recipe("world-d2"), **changes))


def test_objective_and_adapters_are_part_of_a_hash():
    old = dataclasses.replace(get_recipe("world-d2"), precision="fp32")
    told = old.to_json()
    for name in ("objective", "dpo", "lora"):
        del told[name]
    assert Recipe.from_json(told).hash == old.hash
    variants = [{"objective": "dpo"}, {"lora": LoRA(rank=4)}, {"dpo": DPO(beta=1.0)}]
    assert len({dataclasses.replace(old, **changes).hash for changes in variants} | {old.hash}) == 4


def test_the_paper_s_recipe_and_its_plan():
    """Rank 128 on all linears: 4,000 steps for 2B, 2,000 for 8B. Adapters alone have masters and moments."""
    two, eight = get_recipe("dpo-d24"), get_recipe("dpo-d38")
    assert (two.steps, eight.steps, two.lora.rank) == (4000, 2000, 128)
    plan = make_hardware_plan(two, world_size=8)
    with torch.device("meta"):
        model = two.model.build()
        add_adapters(model, rank=128, alpha=128)
    assert plan.trained_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.parameters == sum(p.numel() for n, p in model.named_parameters() if not is_adapter(n))
    sizes = plan.bytes_per_rank["stage3"]
    assert sizes["weights"] == math.ceil(2 * (plan.parameters + plan.trained_parameters) / 8)
    assert sizes["moments"] == math.ceil(8 * plan.trained_parameters / 8)


def test_adapters_need_weights_to_stand_on():
    with pytest.raises(UserError, match="give --init-from"):
        set_init_weights(get_recipe("world-dpo-d2"), None)


# --- real ranks


@pytest.fixture(scope="module")
def stages(data, base, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("stages") / "found.json"
    run_ranks([str(Path(__file__).parent / "trainer_dpo_checks.py"), str(data), str(base), str(out)], 2)
    return json.loads(out.read_text())


@pytest.mark.dist
@pytest.mark.parametrize("name", VARIANTS)
def test_frozen_weights_arrive_and_stay_under_every_stage(stages, name):
    found, model = stages[name], build()
    assert found["first_error"] < 1e-6
    assert found["reference_error"] < 1e-6  # after three steps of its adapters
    assert found["changed"] > 1e-3
    assert found["losses"][0] == pytest.approx(math.log(2), abs=1e-5)
    assert found["losses"] == pytest.approx(stages["stage3"]["losses"], rel=1e-4)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    adapters = sum(4 * (m.in_features + m.out_features) for m in linears)
    whole = sum(p.numel() for p in model.parameters())
    assert found["parameters"] == whole
    assert found["trained"] == pytest.approx(adapters * (2 if name == "stage0" else 1), rel=1e-6)
    # Only shards of the frozen weights lie on a rank under stage 3; moments are the adapters' alone.
    sharded = name in ("stage3", "persistent", "recompute")
    assert found["weights"] == pytest.approx(4 * (whole + adapters) / (2 if sharded else 1), rel=1e-2)
    assert found["moments"] == pytest.approx(8 * adapters / (1 if name == "stage0" else 2), rel=1e-2)


STEPS = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory, data) -> Path:
    info = open_dataset(str(data)).info
    meta = {"kind": "ema", "backbone": "mmdit", "config": CONFIG.to_json(), "text_spec": info.text_spec.to_json()}
    return save_weights(tmp_path_factory.mktemp("base") / "ema.safetensors", build().state_dict(), meta)


def command(data: Path, base: Path, out: Path, *more: str) -> list[str]:
    options = [
        *TINY, "--images", str(8 * STEPS), "--dpo.beta", "100", "--schedule.warmup-images", "0",
        "--logging.log-every", "8", "--logging.save-every", "48", "--validation.every", "48",
    ]  # fmt: skip
    start = ["-m", "trainer", "train", "world-dpo-d2", "--data", str(data), "--init-from", str(base), "--out", str(out)]
    return [*start, *options, *more]


@pytest.fixture(scope="module")
def straight(data, base, tmp_path_factory) -> Path:
    """ZeRO-3 on two ranks, every parameter sharded."""
    out = tmp_path_factory.mktemp("runs") / "dpo"
    run_ranks(command(data, base, out), 2)
    return out


@pytest.mark.dist
def test_zero_3_on_two_ranks_starts_at_ln_2_and_learns(straight):
    assert read_figure(straight)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert read_figure(straight)[-1] < 0.5
    assert read_figure(straight, "dpo/reward_margin")[-1] > 0.5
    # Pairs that were not trained on, of the same eight kinds of things.
    rows = {row.metric: row for row in ResultStore(str(straight / "results")).rows(prefix="val_dpo")}
    assert rows["val_dpo/accuracy"].value > 0.8
    assert rows["val_dpo/accuracy"].higher_is_better
    assert not rows["val_dpo/loss"].higher_is_better
    assert rows["val_dpo/loss"].sample_count == 16


@pytest.mark.dist
def test_checkpoints_hold_the_adapters_alone_and_exports_are_whole(straight, base):
    index = json.loads((straight / "checkpoints" / "step_0000012" / "rank_00000.json").read_text())
    assert all(is_adapter(name) for name, *_ in index["segments"])
    first, last = (load_weights(path)[0] for path in (base, straight / "weights" / "raw.safetensors"))
    assert first.keys() == last.keys()
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    with torch.device("meta"):
        linears = {f"{n}.weight" for n, m in CONFIG.build().named_modules() if isinstance(m, torch.nn.Linear)}
    assert changed == linears


@pytest.mark.dist
def test_one_rank_and_an_interrupted_run_give_the_same(straight, data, base, tmp_path):
    """One process, of another stage, from the two ranks' checkpoint at half time."""
    half = tmp_path / "dpo"
    shutil.copytree(straight, half, ignore=shutil.ignore_patterns("tensorboard", "step_0000012", "*.safetensors.md"))
    shutil.copytree(
        straight / "checkpoints" / "step_0000006", half / "checkpoints" / "step_0000006", dirs_exist_ok=True
    )
    run_ranks(command(data, base, half, "--parallel.zero-stage", "0"), 1)
    assert len(read_figure(half)) == STEPS
    assert read_figure(half) == pytest.approx(read_figure(straight), rel=1e-3, abs=1e-5)
    assert read_figure(half, "dpo/accuracy", "val")[-1] == read_figure(straight, "dpo/accuracy", "val")[-1]
    one, two = (load_weights(run / "weights" / "ema.safetensors")[0] for run in (straight, half))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4


@pytest.mark.dist
def test_exports_merged_or_as_an_adapter(straight, data, base, tmp_path, monkeypatch):
    def trainer(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["trainer", "export", str(straight), "--data", str(data), *arguments])
        main()

    with pytest.raises(UserError, match="give --base"):
        trainer("--out", str(tmp_path / "x.safetensors"))
    with pytest.raises(UserError, match="is not the file that the run started from"):
        trainer("--out", str(tmp_path / "x.safetensors"), "--base", str(straight / "weights" / "raw.safetensors"))
    trainer("--out", str(tmp_path / "merged.safetensors"), "--base", str(base))
    trainer("--out", str(tmp_path / "adapter"), "--lora", "adapter")
    trainer("--out", str(tmp_path / "diffusers"), "--lora", "adapter", "--format", "diffusers")
    names = safe_open(tmp_path / "diffusers" / DIFFUSERS_ADAPTER, framework="pt").keys()
    assert "transformer.transformer_blocks.0.attn.to_k.lora_A.weight" in set(names)
    assert read_meta(tmp_path / "merged.safetensors")["images_seen"] == 8 * STEPS
    merge_files(base, tmp_path / "adapter", tmp_path / "again.safetensors")
    files = [straight / "weights" / "ema.safetensors", tmp_path / "merged.safetensors", tmp_path / "again.safetensors"]
    first, *others = (load_weights(file)[0] for file in files)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.dist
def test_data_without_pairs_is_refused_before_any_work(base, tmp_path, monkeypatch):
    write_synthetic(str(tmp_path / "data"), num_samples=32, val_samples=8, latent_shape=(4, 8, 8), buckets=("32x32",))
    monkeypatch.setattr(sys, "argv", ["trainer", *command(tmp_path / "data", base, tmp_path / "run", "--dry-run")[2:]])
    with pytest.raises(UserError, match="no preference pairs"):
        main()


def test_two_passes_are_one_step_to_deepspeed(stages):
    """Each block is gathered for the reference, for the policy and for its backward pass, always with a whole trace of
    the step: without one DeepSpeed prefetches nothing."""
    wire = stages["wire"]
    assert [len(calls) for calls in wire["blocks"]] == [3 * wire["depth"]] * 2
    assert wire["traced"] == [3 * wire["depth"]] * 2
