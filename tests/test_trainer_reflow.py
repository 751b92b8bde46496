"""Reflow: the loss against its formula, its floor on straight flows, what is refused; runs on two ranks, two rounds."""
# Shapes: B batch, C latent channels, H and W latent height and width.

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from trainer_launch import TINY, read_figure, run_ranks

from data_pipeline.couplings.command import CoupleOptions, choose_guidance, couple
from data_pipeline.couplings.teacher import TeacherFile
from data_pipeline.formats.schema import read_dataset_info
from data_pipeline.loading.loader import open_dataset
from data_pipeline.packing.synthetic import write_synthetic
from eval.drawing.generate import ImageRequest, Painter, Sampling
from infra.codec import to_json
from infra.errors import UserError
from infra.results import ResultStore
from model.backbones.mmdit import MMDiTConfig
from model.diffusion.flow import get_formulation
from model.encoders.text import TextCond
from model.files.weights import load_weights, read_meta, save_weights
from trainer.checks.preflight import set_init_weights
from trainer.checks.students import check_couplings, check_start
from trainer.checks.values import check_values
from trainer.feed import DeviceBatch, draw_noise
from trainer.objective import check_objective
from trainer.recipe import LoRA, Student, Validation
from trainer.recipes import get_recipe
from trainer.regression import compute_regression_loss
from trainer.students import StudentLoss, reflow

FORM = get_formulation("rf/ushape(4)")
CONFIG = MMDiTConfig(depth=2, in_channels=4, context_width=48, pooled_width=32)


def batch_of(scale: float) -> DeviceBatch:
    """The coupling of a straight flow from unit noise to N(0, scale^2): x0 = scale * noise."""
    noise = torch.randn(6, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t_B = torch.tensor([0.0, 1e-5, 0.3, 0.7, 1 - 1e-5, 1.0], dtype=torch.float64)
    return DeviceBatch(scale * noise, noise, t_B, TextCond(torch.zeros(6, 1, 1), torch.zeros(6, 1)))


def straight(scale: float):
    """Its velocity: x_t = ((1-t) scale + t) noise, so v = (1 - scale) / ((1-t) scale + t) x_t."""

    def network(x_BCHW, t_B, text):
        t = t_B.to(x_BCHW.dtype).view(-1, 1, 1, 1)
        return x_BCHW * (1 - scale) / ((1 - t) * scale + t)

    return network


@pytest.mark.parametrize("loss", ["l2", "huber"])
@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0])
def test_a_straight_flow_stays_as_it_is(scale, loss):
    """Its loss is at the floor, zero, at every time; so is the gradient of a network that holds it."""
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)

    def network(*given):
        return factor * straight(scale)(*given)

    found = reflow(network, batch_of(scale), formulation=FORM, loss=StudentLoss(loss, 0.00054)).loss_B
    assert found.abs().max() < 1e-28
    found.mean().backward()
    assert abs(factor.grad.item()) < 1e-12


def test_noise_and_latent_are_not_swapped():
    """The straight flow of the swapped coupling has a loss that is known: velocities of opposite sign."""
    batch = batch_of(0.2)
    swapped = batch._replace(x0_BCHW=batch.noise_BCHW, noise_BCHW=batch.x0_BCHW)
    found = reflow(straight(0.2), swapped, formulation=FORM, loss=StudentLoss("l2", 1.0)).loss_B
    at_noise = (0.8 * 0.2 + 0.8) ** 2 * batch.noise_BCHW[5].square().mean()  # x_1 = 0.2 e, asked for -0.8 e
    assert found[5].item() == pytest.approx(at_noise.item())
    assert found.min() > 0.1


@pytest.mark.parametrize("loss", ["l2", "huber"])
def test_the_loss_against_the_formula_in_numpy(loss):
    batch = batch_of(0.5)
    x0 = batch.x0_BCHW + 0.1 * torch.arange(6, dtype=torch.float64).view(-1, 1, 1, 1)
    batch = batch._replace(x0_BCHW=x0)
    found = reflow(lambda x, t, text: 0.3 * x, batch, formulation=FORM, loss=StudentLoss(loss, 0.01)).loss_B
    t = batch.t_B.numpy()[:, None, None, None]
    e, x = batch.noise_BCHW.numpy(), x0.numpy()
    error = 0.3 * ((1 - t) * x + t * e) - (e - x)
    n = 32
    expected = (error**2).mean((1, 2, 3))
    if loss == "huber":
        expected = (np.sqrt((error**2).sum((1, 2, 3)) + (0.01 * n) ** 2) - 0.01 * n) / n
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_huber_is_a_norm_far_out_and_a_square_near_zero():
    target = torch.zeros(1, 100)
    far = compute_regression_loss(torch.full((1, 100), 1e4), target, loss="huber", huber=0.00054).item()
    assert far == pytest.approx(1e4 * 10 / 100, rel=1e-3)
    near = compute_regression_loss(torch.full((1, 100), 1e-4), target, loss="huber", huber=0.00054).item()
    assert near == pytest.approx(1e-8 * 100 / (2 * 0.054) / 100, rel=2e-2)
    assert compute_regression_loss(
        torch.ones(1, 4, dtype=torch.bfloat16), torch.zeros(1, 4), loss="l2", huber=1.0
    ).dtype == (torch.float32)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"formulation": "rf/lognorm(0.00,1.00)"}, r"draws times as pretraining does.*rf/ushape\(4\)"),
        ({"formulation": "rf/mode(1.29)"}, "any-density"),
        ({"formulation": "eps/linear"}, "regresses the velocity of a rectified flow"),
        ({"validation": Validation()}, "--validation.protocol coupled"),
        ({"lora": LoRA(rank=4)}, "leave --lora.rank out"),
    ],
)
def test_recipes_that_cannot_work_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        check_objective(dataclasses.replace(get_recipe("world-reflow-d2"), **changes))


def test_recipes_that_work():
    recipe = get_recipe("world-reflow-d2")
    for density in ("rf/ushape(4)", "rf"):
        check_objective(dataclasses.replace(recipe, formulation=density))
    kept = dataclasses.replace(recipe, formulation="rf/lognorm(0,1)", student=Student(any_density=True))
    check_objective(kept)
    with pytest.raises(UserError, match=r"student.huber is 0"):
        check_values(dataclasses.replace(recipe, student=Student(huber=0.0)))
    with pytest.raises(UserError, match=r"student.teacher_steps is 0"):
        check_values(dataclasses.replace(recipe, student=Student(teacher_steps=0)))
    for depth in (24, 38):
        large = get_recipe(f"reflow-d{depth}")
        check_objective(large)
        assert (large.optimizer.lr, large.images) == (1e-6, 25_600_000)


def test_a_student_s_options_are_part_of_its_hash_and_of_no_other_recipe_s():
    base = dataclasses.replace(get_recipe("world-reflow-d2"), precision="fp32")
    variants = [dataclasses.replace(base, student=Student(**each)) for each in (
        {"loss": "huber"}, {"loss": "huber", "huber": 0.01}, {"any_density": True})]  # fmt: skip
    assert len({recipe.hash for recipe in [base, *variants]}) == 4


# --- couplings and weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reflow")
    write_synthetic(str(path / "data"), num_samples=64, val_samples=8, latent_shape=(4, 8, 8), buckets=("32x32",))
    write_weights(path / "teacher.safetensors", path)
    couple_with(path, "teacher.safetensors", "coupled")
    return path


def write_weights(path: Path, folder: Path, **meta) -> Path:
    """Nothing at zero."""
    model, info = CONFIG.build(), read_dataset_info(str(folder / "data"))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    told = {
        "kind": "ema", "backbone": "mmdit", "config": CONFIG.to_json(), "formulation": "rf/lognorm(0.00,1.00)",
        "shift": 1.0, "text_spec": to_json(info.text_spec), "vae": to_json(info.vae), "resolution": info.resolution,
    }  # fmt: skip
    return save_weights(path, model.state_dict(), told | meta)


def couple_with(folder: Path, teacher: str, out: str, **changes) -> None:
    couple(
        CoupleOptions(
            **{
                "teacher": str(folder / teacher), "prompts": str(folder / "data"), "out": str(folder / out),
                "count": 64, "steps": 4, "solver": "euler", "workers": 0, "val_every": 4, "precision": "fp32",
            }
            | changes
        )
    )  # fmt: skip


def test_a_student_without_dropped_captions_teaches_the_next_round_unguided(folder):
    told = {"objective": "reflow", "guidance": 1.0, "guidance_kind": "baked"}
    teacher = TeacherFile(str(write_weights(folder / "undropped.safetensors", folder, few_step=told)))
    options = CoupleOptions(teacher=teacher.uri, prompts="", out="", count=1)
    assert choose_guidance(options, teacher) == 1.0
    with pytest.raises(UserError, match="learnt with no captions dropped: give --guidance 1"):
        choose_guidance(dataclasses.replace(options, guidance=1.5), teacher)
    plain = TeacherFile(str(folder / "teacher.safetensors"))
    assert [choose_guidance(dataclasses.replace(options, guidance=g), plain) for g in (None, 3.0)] == [1.5, 3.0]


def test_training_draws_the_noise_that_the_latents_were_made_of(folder):
    dataset = open_dataset(str(folder / "coupled"))
    batches = dataset.batches(seed=0, global_batch=8, encoder_dropout=0.0)
    batch = next(batches)
    batches.close()
    micro = draw_noise(batch, FORM, seed=3, shift=1.0)
    assert torch.equal(micro.noise_BCHW, batch.noise_BCHW)
    assert torch.equal(micro.to(torch.device("cpu")).noise_BCHW, batch.noise_BCHW)


def started(folder: Path, weights: str = "teacher.safetensors", **changes):
    recipe = dataclasses.replace(get_recipe("world-reflow-d2"), model=CONFIG, **changes)
    return set_init_weights(recipe, str(folder / weights)), str(folder / weights)


def test_a_student_meets_its_teacher_s_couplings(folder):
    dataset = open_dataset(str(folder / "coupled"))
    recipe, weights = started(folder)
    check_couplings(recipe, dataset, weights)
    with pytest.raises(UserError, match="starts from the teacher's weights"):
        check_couplings(get_recipe("world-reflow-d2"), dataset, None)
    recipe, weights = started(folder, shift=3.0)
    with pytest.raises(UserError, match=r"shifted by 1, those of recipe .* by 3: give --shift 1"):
        check_couplings(recipe, dataset, weights)
    with pytest.raises(UserError, match=r"holds no couplings.*data_pipeline couple"):
        check_couplings(started(folder)[0], open_dataset(str(folder / "data")), weights)
    with pytest.raises(UserError, match="which objective pretrain does not train on"):
        check_couplings(get_recipe("world-d2"), dataset, None)
    other = dataclasses.replace(get_recipe("world-d2"), validation=Validation(protocol="coupled"))
    with pytest.raises(UserError, match="coupled needs couplings"):
        check_couplings(other, open_dataset(str(folder / "data")), None)


def test_a_frozen_teacher_is_asked_on_ordinary_data(folder):
    """Objectives that ask the weights they start from: which data and which weights they take."""
    ordinary, coupled = (open_dataset(str(folder / name)) for name in ("data", "coupled"))
    recipe = dataclasses.replace(get_recipe("world-perflow-d2"), model=CONFIG)
    teacher = str(folder / "teacher.safetensors")
    check_couplings(recipe, ordinary, teacher)
    with pytest.raises(UserError, match=r"objective perflow with --student\.guidance does not train on"):
        check_couplings(recipe, coupled, teacher)
    averages = dataclasses.replace(recipe, objective="meanflow", student=Student(guidance=1.5))
    check_couplings(averages, ordinary, teacher)
    with pytest.raises(UserError, match=r"objective meanflow with --student\.guidance does not train on"):
        check_couplings(averages, coupled, teacher)
    with pytest.raises(UserError, match=r"starts from the teacher's weights: give --init-from WEIGHTS$"):
        check_couplings(recipe, ordinary, None)
    told = {"teacher": "0", "objective": "distil"}
    student = str(write_weights(folder / "few.safetensors", folder, few_step=told | {"steps": 1}))
    with pytest.raises(UserError, match=r"student of few steps .objective distil.*ask its teacher"):
        check_couplings(recipe, ordinary, student)
    check_couplings(dataclasses.replace(recipe, student=Student(guidance=1.0, any_teacher=True)), ordinary, student)
    straighter = str(write_weights(folder / "again.safetensors", folder, few_step=told | {"objective": "reflow"}))
    check_couplings(recipe, ordinary, straighter)
    baked = str(write_weights(folder / "baked.safetensors", folder, few_step=told | {"guidance_kind": "baked"}))
    with pytest.raises(UserError, match=r"cannot be guided any more.*make couplings of it"):
        check_couplings(dataclasses.replace(recipe, student=Student(guidance=1.0, any_teacher=True)), ordinary, baked)
    with pytest.raises(UserError, match=r"trained with times shifted by 1, .* by 3: give --shift 1"):
        check_couplings(dataclasses.replace(recipe, shift=3.0), ordinary, teacher)
    eps = str(write_weights(folder / "eps2.safetensors", folder, formulation="eps/linear"))
    with pytest.raises(UserError, match="predicts eps on the path of eps/linear"):
        check_couplings(recipe, ordinary, eps)


def test_another_teacher_or_formulation_is_refused(folder):
    dataset = open_dataset(str(folder / "coupled"))
    write_weights(folder / "other.safetensors", folder, run="another run")
    recipe, weights = started(folder, "other.safetensors")
    with pytest.raises(UserError, match=r"made by the teacher .* is another network"):
        check_couplings(recipe, dataset, weights)
    check_couplings(dataclasses.replace(recipe, student=Student(any_teacher=True)), dataset, weights)
    teacher = dataset.info.couplings.teacher
    write_weights(folder / "stage1.safetensors", folder, few_step={"teacher": teacher, "objective": "reflow"})
    check_couplings(started(folder, "stage1.safetensors")[0], dataset, str(folder / "stage1.safetensors"))
    write_weights(folder / "eps.safetensors", folder, formulation="eps/linear")
    recipe, weights = started(folder, "eps.safetensors")
    with pytest.raises(UserError, match="predicts eps on the path of eps/linear"):
        check_couplings(recipe, dataset, weights)


def test_weights_of_another_text_are_refused(folder):
    dataset, spec = open_dataset(str(folder / "coupled")), read_dataset_info(str(folder / "data")).text_spec
    layout = "trimmed" if spec.layout == "padded" else "padded"
    write_weights(folder / "layout.safetensors", folder, text_spec=to_json(dataclasses.replace(spec, layout=layout)))
    recipe, weights = started(folder, "layout.safetensors", student=Student(any_teacher=True))
    with pytest.raises(UserError, match=rf"text of layout {layout} .*holds layout {spec.layout}"):
        check_couplings(recipe, dataset, weights)
    moved = dataclasses.replace(spec, encoders=tuple(dataclasses.replace(e, checkpoint="x") for e in spec.encoders))
    write_weights(folder / "moved.safetensors", folder, text_spec=to_json(moved))
    recipe, weights = started(folder, "moved.safetensors", student=Student(any_teacher=True))
    check_couplings(recipe, dataset, weights)


def test_ordinary_training_from_a_student_is_refused_unless_it_is_asked_for(folder):
    weights = write_weights(folder / "student.safetensors", folder, few_step={"teacher": "0", "objective": "reflow"})
    recipe = dataclasses.replace(get_recipe("world-d2"), model=CONFIG)
    with pytest.raises(UserError, match=r"student of few steps .objective reflow.*--student.any-teacher"):
        check_start(recipe, str(weights))
    check_start(dataclasses.replace(recipe, student=Student(any_teacher=True)), str(weights))
    check_start(recipe, str(folder / "teacher.safetensors"))
    check_start(recipe, None)


# --- real ranks

STEPS = 12


def command(folder: Path, out: Path, *more: str, data: str = "coupled", start: str = "teacher") -> list[str]:
    return [
        "-m", "trainer", "train", "world-reflow-d2", "--data", str(folder / data), "--init-from",
        str(folder / f"{start}.safetensors"), "--out", str(out), *TINY, "--images", str(8 * STEPS),
        "--schedule.warmup-images", "0", "--logging.log-every", "8", "--logging.save-every", "48",
        "--validation.every", "48", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(folder) -> Path:
    run_ranks(command(folder, folder / "run"), 2)
    return folder / "run"


@pytest.mark.dist
def test_zero_3_on_two_ranks_learns_held_out_couplings(run):
    assert len(read_figure(run)) == STEPS
    rows = ResultStore(str(run / "results")).rows(metric="val_loss/coupled")
    assert rows[-1].value < rows[0].value
    assert rows[-1].sample_count == 16


@pytest.mark.dist
def test_weights_say_how_they_are_sampled(run, folder):
    meta, info = read_meta(run / "weights" / "ema.safetensors"), read_dataset_info(str(folder / "coupled"))
    assert meta["few_step"] == {
        "objective": "reflow", "round": 1, "teacher": info.couplings.teacher, "solver": "euler", "guidance": 1.5,
        "guidance_kind": "baked", "couplings": info.fingerprint,
    }  # fmt: skip
    assert meta["formulation"] == "rf/ushape(4.00)"


@pytest.mark.dist
def test_an_interrupted_run_ends_the_same_to_the_bit(run, folder, tmp_path):
    half = tmp_path / "run"
    shutil.copytree(run, half, ignore=shutil.ignore_patterns("tensorboard", "step_0000012", "*.safetensors"))
    shutil.copytree(run / "checkpoints" / "step_0000006", half / "checkpoints" / "step_0000006", dirs_exist_ok=True)
    run_ranks(command(folder, half), 2)
    one, two = (load_weights(path / "weights" / "ema.safetensors")[0] for path in (run, half))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.dist
def test_a_second_round_starts_from_the_first_student(run, folder):
    """And on one process without ZeRO, from couplings that its own flow makes."""
    shutil.copy(run / "weights" / "ema.safetensors", folder / "first.safetensors")
    with pytest.raises(UserError, match=r"has guidance 1\.5 baked in: give --guidance 1"):
        couple_with(folder, "first.safetensors", "coupled2", guidance=2.0)
    with pytest.raises(UserError, match=r"guidance 1\.5 baked in, and guidance 4 would multiply"):
        next(Painter(folder / "first.safetensors").paint([ImageRequest("a dog")], Sampling(steps=1)))
    couple_with(folder, "first.safetensors", "coupled2", guidance=None)
    assert read_dataset_info(str(folder / "coupled2")).couplings.round == 2
    second = folder / "second"
    run_ranks(command(folder, second, "--parallel.zero-stage", "0", "--student.loss", "huber", data="coupled2",
                      start="first"), 1)  # fmt: skip
    few = read_meta(second / "weights" / "ema.safetensors")["few_step"]
    assert (few["round"], few["guidance_kind"], few["guidance"]) == (2, "baked", 1.5), "the first round's stays in"
    assert all(math.isfinite(loss) for loss in read_figure(second))
