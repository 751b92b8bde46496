"""Pairs without people: prompts that no evaluation asks for, a judge's best and worst picture, a data set for DPO."""

import numpy as np
import pytest
import torch

from data_pipeline.inspection.verify import verify_dataset
from data_pipeline.loading.loader import open_dataset
from data_pipeline.loading.pairs import RejectedLatents
from data_pipeline.plans import WORLD_TEXT, read_vae_meta
from data_pipeline.world.scenes import make_scene
from eval.drawing.generate import Painter, Sampling
from eval.judging.judges import build_judges
from eval.judging.prompts import list_world_compbench_prompts, list_world_geneval_prompts
from eval.studies.pairs import PairOptions, draw_world_prompts, make_pairs, rank_pictures, score_by_clip, score_by_vqa
from infra.errors import UserError
from model.backbones.mmdit import MMDiTConfig
from model.files.weights import save_weights


def test_prompts_of_the_world_are_none_that_are_evaluated():
    found = draw_world_prompts(60)
    assert len(found) == len(set(found)) == 60
    assert not set(found) & {p.text for p in (*list_world_geneval_prompts(50), *list_world_compbench_prompts(50))}


@pytest.mark.parametrize("rank", [score_by_vqa, score_by_clip])
def test_rankers_prefer_the_scene_that_shows_the_caption(rank):
    scenes = [make_scene(5, index, split="eval_truth", tag="colors") for index in range(12)]
    texts = [scene.caption for scene in scenes]
    right = rank(build_judges("world"), texts, [scene.image for scene in scenes])
    wrong = rank(build_judges("world"), texts, [scene.image for scene in scenes[1:] + scenes[:1]])
    assert right.shape == (12,)
    assert np.mean(right > wrong) > 0.9


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    config = MMDiTConfig(depth=1, in_channels=8, context_width=384, pooled_width=128)
    model = config.build()
    with torch.no_grad():
        for param in model.parameters():
            param += 0.05 * torch.randn(param.shape, generator=torch.Generator().manual_seed(param.numel()))
    meta = {
        "kind": "ema", "backbone": "mmdit", "config": config.to_json(), "formulation": "rf/lognorm(0.00,1.00)",
        "text_spec": WORLD_TEXT.to_json(), "vae": vars(read_vae_meta("world:vae")), "resolution": 64, "shift": 1.0,
    }  # fmt: skip
    return str(save_weights(tmp_path_factory.mktemp("weights") / "ema.safetensors", model.state_dict(), meta))


def options(weights: str, out: str, **changes) -> PairOptions:
    few = {"num_prompts": 6, "images_per_prompt": 3, "least_gap": 0.0, "ranker": "clip", "val_fraction": 0.34}
    return PairOptions(weights, out, sampling=Sampling(steps=2, seed=1), **{**few, **changes})


def test_the_best_and_the_worst_picture_make_a_pair(weights, tmp_path, capsys):
    given = options(weights, str(tmp_path / "pairs"))
    make_pairs(given)
    assert "6 pairs from 6 prompts (2 for validation)" in capsys.readouterr().out
    assert not verify_dataset(given.out).problems
    dataset, val = open_dataset(given.out), open_dataset(given.out, split="val")
    assert (dataset.num_samples, val.num_samples) == (4, 2)
    RejectedLatents(val)
    batches = dataset.batches(seed=0, global_batch=4, read_rejected=RejectedLatents(dataset))
    batch = next(batches)
    batches.close()
    assert set(batch.captions) <= set(draw_world_prompts(6))
    # By hand: every picture of each prompt, judged again.
    judges, painter = build_judges("world"), Painter(weights)
    for pair in rank_pictures(painter, judges, draw_world_prompts(6), given):
        scores = score_by_clip(judges, [pair.caption] * 2, [pair.preferred, pair.rejected])
        assert scores[0] > scores[1]
        assert scores == pytest.approx([pair.info["preferred_score"], pair.info["rejected_score"]], abs=1e-6)


def test_pictures_that_are_judged_alike_make_no_pair(weights, tmp_path):
    with pytest.raises(UserError, match="0 of 6 prompts gave a pair"):
        make_pairs(options(weights, str(tmp_path / "pairs"), least_gap=1.5))
    assert not (tmp_path / "pairs").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"ranker": "vq"}, "did you mean 'vqa'"), ({"images_per_prompt": 1}, "2 or more")],
)
def test_mistakes_are_one_line(weights, tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        make_pairs(options(weights, str(tmp_path / "x"), **changes))
