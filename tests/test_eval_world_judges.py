"""The world's judges through the metrics: ground truth near 1, shuffled scenes near 0, noise at 0."""

import numpy as np
import pytest

from eval.calibrate import make_control
from eval.drawing.generate import ImageRequest, Painter, Sampling
from eval.judging.judges import build_judges
from eval.judging.metric import JudgedImage
from eval.judging.prompts import list_world_caption_prompts, list_world_compbench_prompts, list_world_geneval_prompts
from eval.metrics.compbench.metric import CompBench
from eval.metrics.geneval.metric import GenEval
from infra.errors import UserError

PER_TASK = 8
# What ground truth must get at least. Answers of the VQA judge are probabilities, and color multiplies two of them.
FLOORS = {"color": 0.9, "spatial": 0.9, "numeracy": 0.9, "complex": 0.85}


@pytest.fixture(scope="module")
def judges():
    return build_judges("world")


def scores(metric, control, judges, per_task=PER_TASK):
    prompts = metric.prompts(per_task)
    metric.update(
        [JudgedImage(p, i, make_control(control, prompts, index=i, judges=judges)) for i, p in enumerate(prompts)]
    )
    return {score.path: score for score in metric.compute()}


@pytest.fixture(scope="module")
def geneval(judges):
    return {control: scores(GenEval(judges), control, judges) for control in ("ground_truth", "shuffled", "noise")}


@pytest.fixture(scope="module")
def compbench(judges):
    return {control: scores(CompBench(judges), control, judges) for control in ("ground_truth", "shuffled", "noise")}


@pytest.mark.parametrize("split", ["seen", "unseen"])
def test_geneval_of_ground_truth_shuffled_and_noise(geneval, split):
    assert geneval["ground_truth"][f"overall/{split}"].value >= 0.95
    assert geneval["shuffled"][f"overall/{split}"].value <= 0.10
    assert geneval["noise"][f"overall/{split}"].value <= 0.05


def test_geneval_of_what_the_models_weights_draw(judges):
    """`world:d4` ships with the tree and draws most of what is asked for, here in fewer steps than its score's 25."""
    metric = GenEval(judges)
    prompts = metric.prompts(3)
    drawn = Painter("world:d4").paint(
        [ImageRequest(prompt.text) for prompt in prompts], Sampling(steps=12, solver="dpm")
    )  # fmt: skip
    metric.update([JudgedImage(prompt, i, image) for i, (prompt, (_, image)) in enumerate(zip(prompts, drawn))])
    scores = {score.path: score.value for score in metric.compute()}
    assert scores["overall/seen"] >= 0.6, scores


@pytest.mark.parametrize("split", ["seen", "unseen"])
def test_compbench_overall_of_ground_truth_and_shuffled(compbench, split):
    assert compbench["ground_truth"][f"overall/{split}"].value >= 0.95
    assert compbench["shuffled"][f"overall/{split}"].value <= 0.10


@pytest.mark.parametrize("split", ["seen", "unseen"])
@pytest.mark.parametrize(("category", "floor"), FLOORS.items())
def test_compbench_tells_ground_truth_from_shuffled(compbench, category, floor, split):
    path = f"{category}/{split}"
    assert compbench["ground_truth"][path].value >= floor
    assert compbench["shuffled"][path].value <= 0.25


def test_clip_prefers_the_scene_of_its_caption(compbench):
    truth, shuffled = (compbench[c]["non_spatial/seen"].value for c in ("ground_truth", "shuffled"))
    assert truth > shuffled + 0.1


def test_every_task_has_its_rows_and_its_prompts(geneval):
    tasks = {path.split("/")[0] for path in geneval["ground_truth"]}
    assert tasks == {"single_object", "two_object", "counting", "colors", "position", "color_attr", "overall"}
    assert "single_object/unseen" not in geneval["ground_truth"]
    assert geneval["ground_truth"]["overall/seen"].sample_count == 6 * PER_TASK


def test_world_prompts_are_fixed_and_split():
    from data_pipeline.world.grammar import is_seen

    for prompts in (list_world_geneval_prompts(5), list_world_compbench_prompts(5)):
        assert all(is_seen(p.metadata["include"]) is p.seen for p in prompts)
        assert len({(p.task, p.text) for p in prompts}) == len(prompts)
    assert list_world_geneval_prompts(5) == list_world_geneval_prompts(5)
    assert [p.text for p in list_world_caption_prompts(9)][:5] == [p.text for p in list_world_caption_prompts(5)]


def test_compbench_asks_about_the_images_of_geneval():
    drawn = {p.text for p in list_world_geneval_prompts(6)}
    assert {p.text for p in list_world_compbench_prompts(6) if p.task != "complex"} <= drawn


def test_shuffling_gives_every_prompt_the_scene_of_another_one(judges):
    prompts = list_world_geneval_prompts(2)
    for index in range(len(prompts)):
        own = make_control("ground_truth", prompts, index=index, judges=judges)
        assert own.shape == (64, 64, 3)
        assert not np.array_equal(make_control("shuffled", prompts, index=index, judges=judges), own)


def test_unknown_judges_and_missing_official_paths_are_one_line():
    with pytest.raises(UserError, match="did you mean 'world'"):
        build_judges("wrold")
    with pytest.raises(UserError, match=r"--official\.detector PATH"):
        build_judges("official").detector()
