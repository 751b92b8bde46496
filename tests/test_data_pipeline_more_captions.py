"""Several synthetic captions per image, presets of caption servers, and how well a caption fits its image."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.captions.presets import PRESETS
from data_pipeline.captions.registry import CAPTIONERS
from data_pipeline.captions.server import ServerCaptioner
from data_pipeline.captions.spec import DESCRIBE, CaptionerSpec, read_more_captions
from data_pipeline.curation.filters import Thresholds
from data_pipeline.curation.scores import SCORERS
from data_pipeline.flow.estimate import ScaleAssumptions, estimate_costs
from data_pipeline.flow.pipeline import Pipeline
from data_pipeline.inspection.inspect import pick_samples, write_grid
from data_pipeline.inspection.verify import verify_dataset
from data_pipeline.loading.loader import Dataset, open_dataset, share_captions
from data_pipeline.plans import DatasetPlan, build_columns, world
from data_pipeline.selection.filters import select_rows
from data_pipeline.selection.row_values import RowValues
from data_pipeline.sources.registry import open_source
from data_pipeline.world.scenes import make_scene
from infra.errors import UserError
from infra.runner import WorkerPool
from trainer.feed import choose_caption_weights
from trainer.recipe import read_caption_weights
from trainer.recipes import get_recipe

MORE = "{short: {prompt: tiny}, again: {prompt: plain}, rare: {prompt: none}}"


class ShadeCaptioner:
    """Says its prompt and how bright the picture is; of the prompt `none` it has no caption for bright pictures."""

    name, version = "shade", 1

    def __init__(self, spec: CaptionerSpec, device: str) -> None:
        self._prompt = spec.prompt

    def caption(self, images: Sequence[Image.Image]) -> list[str]:
        shades = [int(np.asarray(image).mean()) for image in images]
        return ["" if self._prompt == "none" and shade > 127 else f"{self._prompt} {shade}" for shade in shades]


@pytest.fixture(scope="module")
def plan() -> DatasetPlan:
    return replace(world(), captioner=CaptionerSpec("shade", "", prompt="plain"), val_fraction=0.0)


@pytest.fixture(scope="module")
def dataset(plan: DatasetPlan, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    raw, root = (tmp_path_factory.mktemp(name) for name in ("raw", "root"))
    for number in range(12):
        Image.new("RGB", (64, 64), (number * 20,) * 3).save(raw / f"{number:02d}.png")
        (raw / f"{number:02d}.txt").write_text(f"the original {number}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CAPTIONERS, "shade", ShadeCaptioner)
        made = replace(plan, more_captions=MORE, caption_clip="world:clip").settle()
        Pipeline(made, str(root), open_source(f"folder:{raw}"), workers=WorkerPool(0)).run()
    return open_dataset(str(root))


def test_each_caption_is_stored_under_its_name_with_its_own_states(dataset):
    assert dataset.info.captions == ("original", "synthetic", "short", "again", "rare")
    everything = range(dataset.num_samples)
    said = {name: dataset.read(everything, caption=name) for name in dataset.info.captions}
    shades = [text.split()[-1] for text in said["synthetic"].captions]
    assert said["short"].captions == [f"tiny {shade}" for shade in shades]
    assert {text.split()[0] for text in said["original"].captions} == {"the"}
    # equal texts have equal states, whichever column holds them
    assert said["again"].captions == said["synthetic"].captions
    torch.testing.assert_close(said["again"].text.context_BLD, said["synthetic"].text.context_BLD, rtol=0, atol=0)
    torch.testing.assert_close(said["again"].text.pooled_BP, said["synthetic"].text.pooled_BP, rtol=0, atol=0)
    assert not torch.equal(said["short"].text.context_BLD, said["synthetic"].text.context_BLD)
    # a caption that is missing sets no row aside: another one stands in
    assert dataset.num_samples == 12
    assert Counter(text.split()[0] for text in said["rare"].captions)["none"] == sum(int(s) <= 127 for s in shades)
    assert not verify_dataset(dataset.uri).problems


def test_every_caption_has_a_score_that_a_condition_can_read(dataset):
    columns = [f"caption_clip{name}" for name in ("", "_synthetic", "_short", "_again", "_rare")]
    names = ("original", "synthetic", "short", "again", "rare")
    wanted = [*columns, *(f"caption_{name}" for name in names)]
    rows = [row for _, table in RowValues(dataset).read(wanted) for row in table.to_pylist()]
    assert len(rows) == 12
    score = SCORERS["caption_clip"]("world:clip", "cpu")
    shade = {f"the original {number}": number * 20 for number in range(12)}
    images = [Image.new("RGB", (64, 64), (shade[row["caption_original"]],) * 3) for row in rows]
    for column, name in zip(columns, names):
        expected = score(images, [row[f"caption_{name}"] for row in rows])
        np.testing.assert_allclose([row[column] for row in rows], expected, atol=1e-5)
    lacking = sum(not row["caption_rare"] for row in rows)
    assert lacking == sum(row["caption_clip_rare"] == 0 for row in rows) > 0
    middle = float(np.median([row["caption_clip_short"] for row in rows]))
    chosen = select_rows(dataset, [f"caption_clip_short > {middle} and caption_clip_rare != 0"])
    assert chosen.kept is not None
    assert chosen.kept.num_kept == sum(r["caption_clip_short"] > middle and r["caption_clip_rare"] != 0 for r in rows)


def test_inspect_shows_every_caption_that_a_row_has(dataset, tmp_path):
    shown = pick_samples(dataset, 12)
    assert len(shown) == 12
    by_key = {
        row["key"]: row for _, t in RowValues(dataset).read(["caption_short", "caption_rare"]) for row in t.to_pylist()
    }
    for item in shown:
        rare = ["rare"] if by_key[item.key]["caption_rare"] else []
        assert list(item.captions) == ["original", "synthetic", "short", "again", *rare]
        assert item.captions["short"] == by_key[item.key]["caption_short"]
    write_grid(dataset.vae, shown, str(tmp_path / "g.html"))
    page = (tmp_path / "g.html").read_text()
    assert [page.count(f"<figcaption class={name} ") for name in ("original", "short", "again")] == [12] * 3
    assert page.count("<figcaption class=rare ") == sum(bool(row["caption_rare"]) for row in by_key.values()) < 12
    write_grid(dataset.vae, shown[:2], str(tmp_path / "g.png"))
    assert Image.open(tmp_path / "g.png").height == 160 + (3 * len(shown[0].captions | shown[1].captions) + 1) * 14 + 16


def test_scores_of_captions_change_no_other_column(plan, tmp_path, monkeypatch):
    monkeypatch.setitem(CAPTIONERS, "shade", ShadeCaptioner)
    several = replace(plan, more_captions="{short: {prompt: tiny}}")
    without, scored = (
        build_columns(p.settle(), str(tmp_path)) for p in (several, replace(several, caption_clip="world:clip"))
    )
    assert without.fingerprints.items() <= scored.fingerprints.items()
    added = scored.fingerprints.keys() - without.fingerprints.keys()
    assert added == {"caption_clip", "caption_clip_synthetic", "caption_clip_short"}
    assert without.settings == scored.settings


def test_weights_choose_among_them_and_absent_ones_are_dealt_to_the_others(dataset):
    weights = {"original": 1.0, "short": 3.0}
    batches = dataset.batches(seed=3, global_batch=12, caption_weights=weights)
    words = Counter(text.split()[0] for _ in range(60) for text in next(batches).captions)
    assert set(words) == {"the", "tiny"}
    assert 0.7 < words["tiny"] / words.total() < 0.8
    again = dataset.batches(seed=3, global_batch=12, caption_weights=weights)
    assert [next(again).captions for _ in range(3)] == [
        next(dataset.batches(seed=3, global_batch=12, caption_weights=weights, start=n * 12)).captions for n in range(3)
    ]


def test_columns_of_one_caption_stay_as_they_are(plan, tmp_path, monkeypatch):
    monkeypatch.setitem(CAPTIONERS, "shade", ShadeCaptioner)
    one, several = (build_columns(p.settle(), str(tmp_path)) for p in (plan, replace(plan, more_captions=MORE)))
    assert one.fingerprints.items() <= several.fingerprints.items()
    added = {"caption", "text_clip_l", "text_t5"}
    assert several.fingerprints.keys() - one.fingerprints.keys() == {
        f"{column}_{name}" for column in added for name in ("short", "again", "rare")
    }


@pytest.mark.parametrize(
    ("there", "original", "expected"),
    [
        (("original", "synthetic"), 0.5, {"original": 0.5, "synthetic": 0.5}),
        (("original", "synthetic", "a", "b"), 0.25, {"original": 0.25, "synthetic": 0.25, "a": 0.25, "b": 0.25}),
        (("original", "synthetic"), 1, {"original": 1}),
        (("original", "synthetic", "a"), 0, {"synthetic": 0.5, "a": 0.5}),
        (("synthetic",), 0.25, {"synthetic": 0.75}),
    ],
)  # fmt: skip
def test_the_papers_half_is_dealt_equally(there, original, expected):
    assert share_captions(there, original=original) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{clip_short: {}}", "'clip_short' is no name"),
        ("{quality: {}}", "'quality' is no name"),
        ("{a: [", "not YAML"),
        ("short", "expected settings by name"),
        ("{Short: {}}", "'Short' is no name"),
        ("{original: {}}", "'original' is no name"),
        ("{short: {promt: x}}", "unknown field 'promt' (did you mean 'prompt'?)"),
        ("{short: {max_new_tokens: many}}", "expected an integer"),
        ("{short: {preset: qwen}}", "are for server"),
    ],
)
def test_mistakes_in_more_captions_are_one_line(text, message):
    with pytest.raises(UserError, match=r".*") as refused:
        read_more_captions(text, CaptionerSpec("shade", ""))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def server(**options: object) -> CaptionerSpec:
    return CaptionerSpec("server", "m", url="http://127.0.0.1:1/v1", **options).settle()  # type: ignore[arg-type]


def ask(spec: CaptionerSpec) -> dict:
    return ServerCaptioner(spec, "cpu")._make_body(Image.new("RGB", (8, 8)))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_gives_prompt_limit_and_sampling_and_options_win(name):
    body, preset = ask(server(preset=name)), PRESETS[name]
    assert body["max_tokens"] == preset.max_new_tokens
    assert body["messages"][0]["content"][1]["text"] == (preset.prompt or DESCRIBE)
    assert body.items() >= dict(preset.request).items()
    own = ask(server(preset=name, prompt="Name it.", max_new_tokens=9, request='{"temperature": 0.25, "top_k": 3}'))
    assert (own["max_tokens"], own["temperature"], own["top_k"]) == (9, 0.25, 3)
    assert own["messages"][0]["content"][1]["text"] == "Name it."
    assert json.dumps(own)
    # sampling without a seed would give other captions each time
    assert "seed" in body or body["temperature"] == 0


def test_what_a_preset_says_is_part_of_the_captions_identity_and_its_name_is_not():
    plain = server().identity()
    assert plain == {"name": "server", "prompt": "", "max_new_tokens": 24, "num_beams": 1}
    assert ask(server())["temperature"] == 0
    preset = PRESETS["qwen3-vl"]
    same = server(max_new_tokens=preset.max_new_tokens, request=json.dumps(preset.request))
    assert server(preset="qwen3-vl").identity() == same.identity() != plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "qwen3"}, "did you mean 'qwen3-vl'"),
        ({"request": "{"}, "is not JSON"),
        ({"request": '{"model": "x"}'}, "without model"),
        ({"request": "[1]"}, "expected an object"),
    ],
)
def test_a_wrong_preset_or_request_is_one_line(options, message):
    with pytest.raises(UserError) as refused:
        server(**options)
    assert message in str(refused.value)


def test_a_caption_fits_its_own_scene_better_than_another():
    scenes = [make_scene(0, number, split="train") for number in range(12)]
    images = [Image.fromarray(scene.image) for scene in scenes]
    captions = [scene.caption for scene in scenes]
    score = SCORERS["caption_clip"]("world:clip", "cpu")
    own, other = (np.array(score(images, said)) for said in (captions, captions[1:] + captions[:1]))
    assert (np.abs(own) <= 1).all()
    assert own.mean() > other.mean() + 0.1
    assert score(images[:1], [""]) == [0.0]
    row = {"status": "ok", "reason": "", "width": 64, "height": 64, "caption": "x", "caption_clip": 0.2}
    assert Thresholds(min_caption_clip=0.25).judge(row) == ("bad_caption", "caption_clip 0.2, at least 0.25")
    assert Thresholds().identity() == {"min_side": 32, "max_aspect": 3.0, "max_caption_chars": 5000}


def test_further_captions_are_counted_in_the_estimate():
    def figure(name: str, captions: int) -> float:
        return next(line.value for line in estimate_costs(ScaleAssumptions(captions=captions)) if line.what == name)

    assert figure("captioning", 4) == pytest.approx(3 * figure("captioning", 2))
    text = figure("a sample", 3) - figure("a sample", 2)
    assert figure("a sample", 5) == pytest.approx(figure("a sample", 2) + 3 * text)
    assert figure("objects", 3) > figure("objects", 2)


def test_a_recipe_weighs_captions_by_name_and_its_hash_knows_only_weights_that_are_given(dataset):
    recipe = replace(get_recipe("world-d2"), precision="fp32")
    others = dict.fromkeys(("synthetic", "short", "again", "rare"), 0.125)
    assert choose_caption_weights(recipe.data, dataset) == {"original": 0.5, **others}
    words = ("original=1", "short=3")
    weighed = replace(recipe.data, caption_weights=words)
    assert choose_caption_weights(weighed, dataset) == read_caption_weights(words) == {"original": 1.0, "short": 3.0}
    assert replace(recipe, data=weighed).hash != recipe.hash
    unknown = replace(recipe.data, caption_weights=("shrt=1",))
    with pytest.raises(UserError, match=r"no caption 'shrt' .did you mean 'short'"):
        choose_caption_weights(unknown, dataset)


@pytest.mark.parametrize("words", [("original",), ("a=x",), ("a=-1",), ("a=1", "a=2"), ("a=nan",), ("=1",), ("a=0",)])
def test_caption_weights_that_mean_nothing_are_refused(words):
    with pytest.raises(UserError, match=r"--data.caption-weights"):
        read_caption_weights(words)
