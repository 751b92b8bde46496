"""Students trained by real ranks: the same under every stage, resumed and compiled, and what their weights say."""

import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch
from test_trainer_reflow import CONFIG, couple_with, write_weights
from trainer_launch import TINY, read_figure, run_ranks

from data_pipeline.formats.schema import read_dataset_info
from data_pipeline.loading.loader import open_dataset
from data_pipeline.packing.synthetic import write_synthetic
from eval.drawing.generate import ImageRequest, Painter, Sampling
from infra.errors import UserError
from infra.results import ResultStore
from model.diffusion.few_step import FewStep
from model.files.weights import load_weights, read_meta
from trainer.checks.students import check_start
from trainer.exports.card import describe_student
from trainer.feed import draw_for
from trainer.recipe import Student
from trainer.recipes import get_recipe
from trainer.zero.rankfile import hash_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("students")
    write_synthetic(str(path / "data"), num_samples=64, val_samples=8, latent_shape=(4, 8, 8), buckets=("32x32",))
    write_weights(path / "teacher.safetensors", path)
    couple_with(path, "teacher.safetensors", "coupled", guidance=1.0)
    return path


def test_second_times_have_their_shares_and_depend_on_positions_alone(folder):
    recipe = get_recipe("world-meanflow-d2")
    dataset = open_dataset(str(folder / "coupled"))
    batch = dataset.read(range(dataset.num_samples), seed=0)
    many = batch._replace(
        positions=torch.arange(4000), latent_BCHW=torch.zeros(4000, 1, 1, 1), noise_BCHW=torch.zeros(4000, 1, 1, 1)
    )
    micro = draw_for(recipe, many)
    assert (micro.r_B <= micro.t_B).all()
    assert (micro.r_B == micro.t_B).double().mean().item() == pytest.approx(0.5, abs=0.03)
    assert (micro.r_B == 0).double().mean().item() == pytest.approx(0.25, abs=0.03)
    between = (micro.r_B > 0) & (micro.r_B < micro.t_B)
    assert (micro.r_B / micro.t_B)[between].mean().item() == pytest.approx(0.5, abs=0.03)
    part = draw_for(recipe, many._replace(positions=many.positions[1000:]))
    assert torch.equal(part.r_B, micro.r_B[1000:])
    assert torch.equal(micro.to(torch.device("cpu")).r_B, micro.r_B)
    assert draw_for(get_recipe("world-reflow-d2"), many).r_B is None


def test_weights_say_how_a_student_is_sampled(folder):
    info = read_dataset_info(str(folder / "coupled"))
    recipe = dataclasses.replace(get_recipe("world-distil-d2"), student=Student(steps=2))
    few = describe_student(recipe, info)["few_step"]
    assert (few["steps"], few["sigmas"], few["states"], few["objective"]) == (2, [1.0, 0.5, 0.0], "line", "distil")
    assert FewStep.of({"few_step": few}).step_counts == [1, 2]
    assert describe_student(get_recipe("world-meanflow-d2"), info)["few_step"]["average"] is True
    assert (few["guidance_kind"], few["guidance"]) == ("baked", 1.0), "no caption was dropped"
    dropping = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, encoder_dropout=0.1))
    assert describe_student(dropping, info)["few_step"]["guidance_kind"] == "kept"
    path = write_weights(folder / "two.safetensors", folder, few_step=few)
    with pytest.raises(UserError, match="nothing to lead away from"):
        next(Painter(path).paint([ImageRequest("a dog")], Sampling(steps=1)))
    with pytest.raises(UserError, match="grid of 2 steps"):
        next(Painter(path).paint([ImageRequest("a dog")], Sampling(steps=25, guidance=1.0)))
    with pytest.raises(UserError, match="grid of 2 steps"):
        couple_with(folder, "two.safetensors", "again", guidance=1.0)
    with pytest.raises(UserError, match=r"student of few steps .objective distil"):
        check_start(dataclasses.replace(get_recipe("world-d2"), model=CONFIG), str(path))


def run(folder: Path, name: str, out: str, ranks: int, stage: int, *more: str, data: str = "coupled") -> list[float]:
    run_ranks([
        "-m", "trainer", "train", name, "--data", str(folder / data), "--out", str(folder / out), *TINY,
        "--init-from", str(folder / "teacher.safetensors"), "--images", "48", "--schedule.warmup-images", "0",
        "--logging.log-every", "8", "--logging.save-every", "48", "--validation.every", "48",
        "--parallel.zero-stage", str(stage), "--optimizer.lr", "1e-3", *more,
    ], ranks)  # fmt: skip
    return read_figure(folder / out)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "data", "options", "said"),
    [
        ("world-distil-d2", "coupled", ["--student.steps", "2", "--student.states", "rollout"], ("baked", 1.0, 2)),
        ("world-meanflow-d2", "coupled", [], ("baked", 1.0, None)),
        ("world-meanflow-d2", "data", ["--student.guidance", "1.5", "--validation.protocol", "sd3"],
         ("baked", 1.5, None)),
        ("world-perflow-d2", "data", ["--student.teacher-steps", "2", "--parallel.micro-batch", "2"],
         ("kept", 1.0, 4)),
    ],
)  # fmt: skip
def test_zero_3_on_two_ranks_takes_the_steps_of_one_process_without_it(folder, name, data, options, said):
    """Several passes in a step, some of them with other weights: their gradients are summed alike."""
    sharded, alone = (
        run(folder, name, f"{name}-{data}-{ranks}", ranks, stage, *options, data=data)
        for ranks, stage in ((2, 3), (1, 0))
    )
    assert len(sharded) == 6
    assert sharded == pytest.approx(alone, rel=1e-4)
    made = folder / f"{name}-{data}-2"
    objective = name.split("-")[1]
    few = read_meta(made / "weights" / "ema.safetensors")["few_step"]
    assert few["objective"] == objective
    assert (few["guidance_kind"], few["guidance"], few.get("steps")) == said
    assert few["teacher"] == hash_file(str(folder / "teacher.safetensors"))
    if data == "coupled":
        rows = ResultStore(str(made / "results")).rows(metric=f"val_{objective}/error")
        assert rows[-1].sample_count == 16
        assert math.isfinite(rows[-1].value)


COUPLED = [
    ("world-distil-d2", ["--student.steps", "2", "--student.states", "rollout"]), ("world-meanflow-d2", [])
]  # fmt: skip
ASKING = ("world-perflow-d2", ["--student.teacher-steps", "2"])


def choose_data(name: str) -> str:
    return "data" if name == ASKING[0] else "coupled"


@pytest.fixture(scope="module")
def student_run(folder, request) -> tuple[str, list[str], Path]:
    """Six steps, with a checkpoint after three of them."""
    name, options = request.param
    out = f"{name}-six"
    run(folder, name, out, 1, 3, *options, "--logging.save-every", "24", data=choose_data(name))
    return name, options, folder / out


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("student_run", [*COUPLED, ASKING], indirect=True)
def test_an_interrupted_student_ends_the_same_to_the_bit(folder, student_run):
    name, options, six = student_run
    half = folder / f"{name}-half"
    shutil.copytree(six, half, ignore=shutil.ignore_patterns("tensorboard", "step_0000006", "*.safetensors"))
    shutil.copytree(six / "checkpoints" / "step_0000003", half / "checkpoints" / "step_0000003", dirs_exist_ok=True)
    manifest = half / "checkpoints" / "step_0000003" / "manifest.json"
    written = manifest.stat().st_mtime_ns
    run(folder, name, half.name, 1, 3, *options, "--logging.save-every", "24", data=choose_data(name))
    assert manifest.stat().st_mtime_ns == written, "it went on from there"
    one, two = (load_weights(path / "weights" / "ema.safetensors")[0] for path in (six, half))
    assert all(torch.equal(one[tensor], two[tensor]) for tensor in one)
    assert read_figure(half) == read_figure(six)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("student_run", COUPLED, indirect=True)
def test_compiled_blocks_take_a_student_s_steps(folder, student_run):
    name, options, six = student_run
    more = [*options, "--parallel.compile"]
    compiled = run(folder, name, f"{name}-compiled", 1, 3, *more, data=choose_data(name))
    assert compiled == pytest.approx(read_figure(six), rel=1e-5)
