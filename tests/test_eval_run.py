"""Drawing and evaluating checkpoints: a picture depends on nothing but its seed; nothing is measured twice or lost."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.drawing.generate import ImageRequest, Painter, Sampling
from eval.judging.metric import Clusters, Prompt, Score
from eval.judging.prompts import list_world_geneval_prompts
from eval.measure import find_checkpoints
from eval.metrics.compbench.files import read_samples
from eval.metrics.geneval.files import check_complete, read_folders
from eval.metrics.registry import METRICS, build_picture_metric
from eval.protocol import describe_protocol, hash_protocol
from eval.run import RunOptions, check_metrics, run
from eval.studies.sample import expand, sample
from infra.errors import UserError
from infra.results import ResultStore
from model.backbones.mmdit import MMDiTConfig
from model.encoders.text import EncoderSpec, TextSpec
from model.files.weights import save_weights

QUICK = Sampling(steps=2, guidance=2.0, batch=4)
SPEC = TextSpec(
    encoders=(
        EncoderSpec("clip_l", "world:clip", "open_clip", tokens=16, width=128, pooled=128),
        EncoderSpec("t5", "world:minilm", "bert_hf", tokens=16, width=384, pooled=0),
    ),
    layout="trimmed",
    context_width=384,
)


def export(path, *, images_seen=1000, seed=0, recipe_hash="r1", **changes):
    """Random weights of depth 1 (not the initial ones: those predict zero), as the trainer would export them."""
    config = MMDiTConfig(depth=1, in_channels=8, context_width=384, pooled_width=128, pos_max=16)
    torch.manual_seed(seed)
    state = {k: v + 0.05 * torch.randn_like(v) for k, v in config.build().state_dict().items()}
    meta = {
        "kind": "ema", "backbone": "mmdit", "config": config.to_json(), "formulation": "rf/lognorm(0.00,1.00)",
        "shift": 1.0, "text_spec": SPEC.to_json(), "resolution": 64, "recipe_hash": recipe_hash,
        "vae": {"checkpoint": "world:vae", "channels": 8, "factor": 4, "shift": -0.021984, "scale": 0.507245},
        "data_fingerprint": "d", "images_seen": images_seen, "code_version": "t", "run": "tiny",
    }  # fmt: skip
    return save_weights(path, state, meta | changes)


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    return Painter(export(tmp_path_factory.mktemp("weights") / "ema.safetensors"))


JOBS = [
    ImageRequest("a red dog"),
    ImageRequest("a cat", number=1),
    ImageRequest("a red dog", number=1),
    ImageRequest("a kite"),
    ImageRequest("a red dog", source="7"),
]


def painted(painter, jobs, **changes):
    return dict(painter.paint(jobs, replace(QUICK, **changes)))


def test_a_picture_does_not_depend_on_its_batch_or_order(painter):
    together = painted(painter, JOBS)
    alone = painted(painter, JOBS[::-1], batch=1)
    for job in JOBS:
        # sums of another order may round one level apart
        assert np.abs(together[job].astype(int) - alone[job].astype(int)).max() <= 1


def test_number_source_words_and_seed_each_make_another_picture(painter):
    first = painted(painter, JOBS)
    pictures = [*first.values(), painted(painter, JOBS[:1], seed=1)[JOBS[0]]]
    for i, a in enumerate(pictures):
        assert a.shape == (64, 64, 3)
        assert a.dtype == np.uint8
        assert all((a != b).mean() > 0.5 for b in pictures[:i])


def test_guidance_and_the_unconditional_input_matter(painter):
    base = painted(painter, JOBS[:1])[JOBS[0]]
    for change in ({"guidance": 1.0}, {"unconditional": "empty_prompt"}, {"steps": 3}, {"shift": 3.0}):
        assert (painted(painter, JOBS[:1], **change)[JOBS[0]] != base).any(), change


def test_leaving_t5_out_puts_zeros_in_its_seat(painter, tmp_path):
    from data_pipeline.checkpoints import resolve
    from model.encoders.networks import load_text_encoders
    from model.encoders.text import assemble

    texts = ["a red dog", "a cat"]
    features = load_text_encoders(SPEC, resolve).encode(texts)
    zeros = assemble(SPEC, features, dropped={"t5": torch.ones(2, dtype=torch.bool)})
    ours = painter._condition(texts, True)
    assert torch.equal(ours.context_BLD, zeros.context_BLD)
    assert torch.equal(ours.mask_BL, zeros.mask_BL)
    assert torch.equal(ours.pooled_BP, zeros.pooled_BP)
    assert not torch.equal(painter._condition(texts, False).context_BLD, zeros.context_BLD)
    one_seat = TextSpec(encoders=SPEC.encoders[:1], layout="trimmed", context_width=384)
    other = Painter(export(tmp_path / "ema.safetensors", text_spec=one_seat.to_json()))
    with pytest.raises(UserError, match="no T5 seat"):
        painted(other, JOBS[:1], without_t5=True)


def test_scores_without_t5_have_names_and_protocols_of_their_own(tmp_path, monkeypatch):
    export(tmp_path / "d1" / "weights" / "step_0000010" / "ema.safetensors", images_seen=40)
    run(options(tmp_path, metrics=("clip_score",), t5="both", calibration=False))
    rows = {r.metric: r for r in ResultStore(str(tmp_path / "d1" / "results")).rows()}
    assert list(rows) == ["world_clip_score", "world_clip_score_no_t5"]
    assert rows["world_clip_score"].value != rows["world_clip_score_no_t5"].value
    protocols = [json.loads(p.read_text()) for p in (tmp_path / "d1/results/protocols").glob("*.json")]
    assert sorted(p["sampling"].get("without_t5", False) for p in protocols) == [False, True]
    kept = list((tmp_path / "d1" / "results" / "values").rglob("*.npz"))
    assert len(kept) == 2


def test_a_checkpoint_that_disappears_is_a_counted_failure(tmp_path):
    from eval.run import EvaluateTask, settle
    from infra.runner import run_units

    there = export(tmp_path / "d1" / "weights" / "step_0000010" / "ema.safetensors", images_seen=40)
    gone = export(tmp_path / "d2" / "weights" / "step_0000010" / "ema.safetensors", images_seen=40, recipe_hash="r2")
    found = find_checkpoints(str(tmp_path))
    gone.unlink()
    units = [{"id": c.run, "checkpoint": vars(c)} for c in found]
    settled = settle(options(tmp_path, metrics=("clip_score",), calibration=False))
    failed = run_units(EvaluateTask(settled), units, workers=0)
    assert list(failed) == ["d2"]
    assert "ema.safetensors" in failed["d2"]
    assert there.exists()
    assert [r.metric for r in ResultStore(str(tmp_path / "d1" / "results")).rows()] == ["world_clip_score"]


@pytest.mark.slow
@pytest.mark.dist
def test_checkpoints_are_shared_by_ray_workers_and_measured_once(tmp_path):
    for step in (10, 20, 30):
        path = tmp_path / "d1" / "weights" / f"step_{step:07d}" / "ema.safetensors"
        export(path, images_seen=step * 4, seed=step)
    (tmp_path / "d2" / "weights" / "step_0000010").mkdir(parents=True)
    (tmp_path / "d2" / "weights" / "step_0000010" / "ema.safetensors").write_bytes(b"torn")
    given = options(tmp_path, metrics=("clip_score",), calibration=False, workers=2)
    with pytest.raises(UserError, match="1 of 4 checkpoints"):
        run(given)
    rows = ResultStore(str(tmp_path / "d1" / "results")).rows()
    assert [r.images_seen for r in sorted(rows, key=lambda r: r.images_seen)] == [40, 80, 120]
    stored = objects(tmp_path)
    with pytest.raises(UserError, match="1 of 4 checkpoints"):
        run(given)
    assert objects(tmp_path) == stored, "measured again"


def test_weights_that_cannot_be_drawn_with_say_what_they_lack(tmp_path):
    path = export(tmp_path / "ema.safetensors", seed=1)
    from model.files.weights import load_weights

    state, meta = load_weights(path)
    save_weights(path, state, {k: v for k, v in meta.items() if k not in ("vae", "text_spec")})
    with pytest.raises(UserError, match="lacks text_spec, vae"):
        Painter(path)


def test_sample_writes_a_grid_its_prompts_and_single_pictures(tmp_path, monkeypatch, capsys):
    weights = export(tmp_path / "ema.safetensors")
    out, folders = tmp_path / "grid.png", tmp_path / "single"
    sample(
        str(weights),
        ("a red dog", 'a/b "quoted" cat'),
        str(out),
        images_per_prompt=2,
        folders=str(folders),
        sampling=QUICK,
    )
    assert capsys.readouterr().out.strip() == str(out)
    assert json.loads((tmp_path / "grid.json").read_text())["prompts"] == ["a red dog", 'a/b "quoted" cat']
    assert sorted(p.name for p in folders.rglob("*.png")) == ["0000.png", "0000.png", "0001.png", "0001.png"]
    assert json.loads((folders / "00001" / "metadata.jsonl").read_text())["prompt"] == 'a/b "quoted" cat'
    with pytest.raises(UserError, match="cannot be"):
        sample(str(weights), ("a/b cat",), folders=str(folders), layout="compbench")
    pictures = {p: p.stat().st_mtime_ns for p in folders.rglob("*.png")}
    next(iter(pictures)).unlink()
    sample(str(weights), ("a red dog", 'a/b "quoted" cat'), folders=str(folders), images_per_prompt=2, sampling=QUICK)
    again = {p: p.stat().st_mtime_ns for p in folders.rglob("*.png")}
    assert sum(again[p] != pictures[p] for p in pictures) == 1, "only the missing picture is drawn"
    sample(str(weights), ("a red dog", 'a/b "quoted" cat'), folders=str(folders), images_per_prompt=3, sampling=QUICK)
    assert len(list(folders.rglob("*.png"))) == 6, "more of each may join"
    other = export(tmp_path / "other.safetensors", seed=1)
    for w, prompts, settings in [
        (other, ("a red dog", 'a/b "quoted" cat'), QUICK),
        (weights, ('a/b "quoted" cat', "a red dog"), QUICK),
        (weights, ("a red dog", 'a/b "quoted" cat'), replace(QUICK, steps=3)),
    ]:
        with pytest.raises(UserError, match="holds pictures of other weights, settings or prompts"):
            sample(str(w), prompts, folders=str(folders), sampling=settings)
    monkeypatch.chdir(tmp_path)
    sample(str(weights), ("a dog",), images_per_prompt=1, sampling=QUICK)
    assert {"sample.png", "sample.json"} <= {path.name for path in tmp_path.iterdir()}, "without a word of where: here"
    with pytest.raises(UserError, match="--batch 0: expected 1 or more"):
        sample(str(weights), ("a dog",), folders=str(tmp_path / "new"), sampling=replace(QUICK, batch=0))
    sample(str(weights), ("a dog",), folders=str(tmp_path / "new"), images_per_prompt=1, sampling=QUICK)
    with pytest.raises(UserError, match="same words"):
        sample(str(weights), ("a dog", "a dog"), folders=str(folders))
    with pytest.raises(UserError, match="nothing to draw"):
        sample(str(weights), (" ",), str(out))
    with pytest.raises(UserError, match=r"prompt 2, '\\udcff', is not valid UTF-8"):
        sample(str(weights), ("a dog", "\udcff"), str(out))
    with pytest.raises(UserError, match=r"its folder cannot be made .*choose another place"):
        sample(str(weights), ("a dog",), "/proc/nope/g.png")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"torn")
    for wrong in (tmp_path / "nope.safetensors", torn):
        with pytest.raises(UserError, match=f"{wrong}.*python -m trainer export"):
            sample(str(wrong), ("a dog",), str(out))


@pytest.mark.parametrize("text", [b"a caf\xe9\n", b'{"prompt": "a dog"}\n{"prompt": "\\ud800"}\n'])
def test_prompt_files_that_are_no_unicode_are_refused(tmp_path, text):
    file = tmp_path / ("p.jsonl" if text.startswith(b"{") else "p.txt")
    file.write_bytes(text)
    with pytest.raises(UserError, match=f"{file}.*UTF-8"):
        expand([str(file)])


def test_metadata_files_make_the_official_folders(tmp_path):
    weights = export(tmp_path / "ema.safetensors")
    records = list_world_geneval_prompts(1)[:2]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(dict(p.metadata)) + "\n" for p in records))
    sample(
        str(weights), (str(tmp_path / "p.jsonl"),), folders=str(tmp_path / "set"), images_per_prompt=1, sampling=QUICK
    )
    found = read_folders(tmp_path / "set")
    assert [f.metadata for f in found] == [dict(p.metadata) for p in records]
    assert check_complete([f.metadata for f in found], [dict(p.metadata) for p in records], 1, allow_partial=False) == 0


def test_compbench_layout_carries_prompt_and_index(tmp_path):
    weights = export(tmp_path / "ema.safetensors")
    sample(
        str(weights),
        ("a red dog", "a cat."),
        folders=str(tmp_path / "s"),
        layout="compbench",
        images_per_prompt=2,
        sampling=QUICK,
    )
    found = read_samples(tmp_path / "s")
    assert [(f.prompt, f.number) for f in found] == [("a red dog", 0), ("a red dog", 1), ("a cat.", 2), ("a cat.", 3)]


def options(runs, **changes):
    given = {
        "metrics": ("geneval", "fid"),
        "prompts_per_task": 1,
        "images_per_prompt": 1,
        "captions": 3,
        "sampling": QUICK,
    }
    return RunOptions(runs=str(runs), **{**given, **changes})


def objects(runs):
    return sorted(p.relative_to(runs) for p in Path(runs).rglob("results/*.jsonl"))


def test_run_measures_each_checkpoint_once(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.metrics.fid.REFERENCES", 200)
    export(tmp_path / "d1" / "weights" / "step_0000010" / "ema.safetensors", images_seen=40)
    export(tmp_path / "d1" / "weights" / "step_0000020" / "ema.safetensors", images_seen=80)
    export(tmp_path / "d2" / "weights" / "step_0000010" / "ema.safetensors", images_seen=40, recipe_hash="r2")
    run(options(tmp_path))
    rows = ResultStore(str(tmp_path / "d1" / "results")).rows()
    geneval = {(r.metric, r.images_seen) for r in rows if r.metric.startswith("world_geneval/overall")}
    assert geneval == {(f"world_geneval/overall/{s}", n) for s in ("seen", "unseen") for n in (40, 80)}
    fid = [r for r in rows if r.metric == "world_fid"]
    assert [r.sample_count for r in fid] == [3, 3]
    assert all(r.value > 0 and not r.higher_is_better for r in fid)
    stored = objects(tmp_path)
    run(options(tmp_path))
    assert objects(tmp_path) == stored, "measured again"

    calibration = {r.metric: r.value for r in ResultStore(str(tmp_path / "results")).rows(prefix="calibration")}
    assert calibration["calibration/world_geneval/ground_truth/overall/seen"] > 0.7
    assert calibration["calibration/world_geneval/noise/overall/seen"] == 0
    assert calibration["calibration/world_fid/ground_truth"] < calibration["calibration/world_fid/noise"]

    protocols = {r.protocol_hash for r in rows}
    assert all((tmp_path / "d1" / "results" / "protocols" / f"{name}.json").exists() for name in protocols)
    run(options(tmp_path, metrics=("fid",), checkpoints="last", calibration=False, sampling=replace(QUICK, steps=3)))
    again = [r for r in ResultStore(str(tmp_path / "d1" / "results")).rows() if r.metric == "world_fid"]
    assert len({r.protocol_hash for r in again}) == 2
    assert [r.images_seen for r in again] == [40, 80, 80]


def test_a_broken_checkpoint_is_counted_and_the_others_are_kept(tmp_path):
    export(tmp_path / "d1" / "weights" / "step_0000020" / "ema.safetensors", images_seen=80)
    broken = tmp_path / "d1" / "weights" / "step_0000010" / "ema.safetensors"
    broken.parent.mkdir()
    broken.write_bytes(b"torn")
    with pytest.raises(UserError, match="1 of 2 checkpoints"):
        run(options(tmp_path, metrics=("clip_score",), calibration=False))
    assert [r.images_seen for r in ResultStore(str(tmp_path / "d1" / "results")).rows()] == [80]


def test_checkpoints_are_found_and_chosen(tmp_path):
    for name, steps in (("d2", (5, 10, 20, 100)), ("d3", (7,))):
        for step in steps:
            file = tmp_path / name / "weights" / f"step_{step:07d}" / "ema.safetensors"
            file.parent.mkdir(parents=True)
            file.touch()
    (tmp_path / "d2" / "weights" / "ema.safetensors").touch()

    def steps(which, root=tmp_path):
        return [(c.run, c.step) for c in find_checkpoints(str(root), which)]

    assert steps("all") == [("d2", 5), ("d2", 10), ("d2", 20), ("d2", 100), ("d3", 7)]
    assert steps("last") == [("d2", 100), ("d3", 7)]
    assert steps("2") == [("d2", 10), ("d2", 100), ("d3", 7)]
    assert steps("last", tmp_path / "d2") == [("d2", 100)]
    with pytest.raises(UserError, match="expected all, last or a number"):
        steps("first")
    with pytest.raises(UserError, match="no checkpoints under"):
        steps("all", tmp_path / "d2" / "nothing")


def test_metric_names_are_checked():
    assert check_metrics(["fid", "val_loss", "fid"]) == ["fid", "val_loss"]
    with pytest.raises(UserError, match="did you mean 'geneval'"):
        check_metrics(["genevl"])
    with pytest.raises(UserError, match="write names with spaces between them"):
        check_metrics(["fid,val_loss"])
    with pytest.raises(UserError, match="empty"):
        check_metrics([])


class Counting:
    """A metric that needs no judge."""

    name, higher_is_better = "counting", True

    def __init__(self):
        self.values = Clusters()

    def prompts(self, per_task):
        return [Prompt(f"prompt {i}", "t") for i in range(per_task)]

    def describe(self):
        return {"version": 1}

    def update(self, samples):
        for item in samples:
            self.values.add("t", item.prompt_index, 1.0)

    def compute(self) -> list[Score]:
        return [self.values.score("")]


def test_the_protocol_hash_moves_with_everything_that_decides_a_number():
    metric, quick = Counting(), QUICK.resolve()

    def protocol(count=3, images=1, **change):
        sampling = replace(quick, **change).protocol()
        return describe_protocol(metric, metric.prompts(count), sampling=sampling, images_per_prompt=images)

    base = protocol()
    assert hash_protocol(base) == hash_protocol(protocol(batch=9))
    others = [
        protocol(count=4), protocol(images=2), protocol(seed=1), protocol(steps=9), protocol(guidance=1.0),
        protocol(shift=2.0), protocol(unconditional="empty_prompt"),
    ]  # fmt: skip
    assert len({hash_protocol(p) for p in [base, *others]}) == 8


def test_a_part_of_a_benchmark_never_carries_its_name(tmp_path):
    from eval.judging.judges import build_judges
    from eval.judging.official import OfficialPaths
    from eval.run import name_row

    (tmp_path / "color_val.txt").write_text("a red dog\na blue cat\n")
    official, world = build_judges("official", OfficialPaths(compbench=str(tmp_path))), build_judges("world")
    geneval, compbench, fid = (build_picture_metric(name, official) for name in ("geneval", "compbench", "fid"))
    whole, part = geneval.prompts(None), geneval.prompts(16)
    assert name_row(geneval, official, prompts=whole, images_per_prompt=4) == "geneval"
    assert name_row(geneval, official, prompts=whole, images_per_prompt=2) == "geneval_partial"
    assert name_row(geneval, official, prompts=part, images_per_prompt=4) == "geneval_partial"
    assert name_row(compbench, official, prompts=compbench.prompts(None), images_per_prompt=10) == "compbench"
    assert name_row(compbench, official, prompts=compbench.prompts(1), images_per_prompt=10) == "compbench_partial"
    assert name_row(geneval, world, prompts=whole, images_per_prompt=4) == "world_geneval"
    assert name_row(fid, official, prompts=part, images_per_prompt=1) == "fid"


def test_metrics_are_a_literal_of_known_names():
    assert list(METRICS) == [
        "val_loss", "geneval", "compbench", "clip_score", "fid", "fid_inception", "typography", "diversity",
        "saturation",
    ]  # fmt: skip


def test_validation_loss_from_the_file_alone_is_the_trainers_figure(tmp_path):
    """Same samples, noise and protocol hash as trainer/validate.py, so that rows of both can be compared."""
    from data_pipeline.loading.loader import open_dataset
    from data_pipeline.packing.synthetic import TINY_TEXT, write_synthetic
    from eval.judging.judges import build_judges
    from eval.metrics.val_loss import ValLoss
    from trainer.recipe import Recipe, Validation
    from trainer.validate import Validator

    info = write_synthetic(str(tmp_path / "data"), num_samples=32, val_samples=40)
    config = MMDiTConfig(depth=1, in_channels=8, context_width=48, pooled_width=32, pos_max=16)
    torch.manual_seed(0)
    state = {k: v + 0.05 * torch.randn_like(v) for k, v in config.build().state_dict().items()}
    path = export(tmp_path / "ema.safetensors")
    from model.files.weights import read_meta

    meta = read_meta(path) | {
        "config": config.to_json(),
        "text_spec": TINY_TEXT.to_json(),
        "data_fingerprint": info.fingerprint,
    }
    painter = Painter(save_weights(path, state, meta))
    metric = ValLoss(build_judges("world"))
    scores, protocol, kept = metric.measure(painter, str(tmp_path / "data"))

    recipe = Recipe(name="tiny", model=config, images=64, global_batch=8, validation=Validation())
    validator = Validator(recipe, open_dataset(str(tmp_path / "data"), split="val"))
    assert protocol == validator.protocol_hash

    class Engine:
        """The weights without ZeRO: what the trainer's engine is to its validator."""

        def inference(self):
            return torch.inference_mode()

        def __call__(self, *given):
            return painter.model(*given)

    class Alone:
        rank, world_size, device = 0, 1, torch.device("cpu")

        def sum_(self, x):
            return x

    found = validator.run(Engine(), Alone())
    assert found.sample_count == scores[0].sample_count == 40
    assert scores[0].path == "sd3"
    assert scores[0].value == pytest.approx(found.mean, rel=1e-9)
    levels = {f"sd3/t{level:.3f}": loss for level, loss in found.per_level.items()}
    assert {s.path: pytest.approx(s.value, rel=1e-9) for s in scores[1:]} == levels
    assert scores[0].low < scores[0].value < scores[0].high
    assert set(kept["stratum"]) == {"sd3", *(f"t{level:.3f}" for level in found.per_level)} == set(found.by_sample)
    for name, loss_B in found.by_sample.items():
        mine = kept["stratum"] == name
        assert kept["sum"][mine] == pytest.approx(loss_B.numpy(), rel=1e-6)
        assert kept["cluster"][mine].tolist() == list(range(40))

    save_weights(path, state, meta | {"data_fingerprint": "another"})
    with pytest.raises(UserError, match="trained on another"):
        metric.measure(Painter(path), str(tmp_path / "data"))
