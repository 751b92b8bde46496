"""Few steps compared: the same noise for teacher and students, rows once, known answers of each new figure."""

import colorsys
import dataclasses
import hashlib
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from eval_runs import write_ladder
from test_eval_run import export

from eval.judging.judges import build_judges
from eval.judging.metric import JudgedImage, Prompt
from eval.metrics.diversity import Diversity
from eval.metrics.saturation import Saturation, measure_contrast, measure_saturation
from eval.report.build import make_few_steps_context, render_page, write_report
from eval.report.fewstep_page import compose_page
from eval.report.fewstep_plots import cut_strips, plot_chart
from eval.report.fewsteps import FewStepLine, compare_few_steps, compose_few_steps, compose_findings
from eval.report.runs import RunFolder, read_runs
from eval.report.seeds import average_points, name_arm
from eval.report.series import MetricPoint
from eval.report.style import make_themes
from eval.studies.fewstep import FewStepOptions, measure_few_steps
from eval.studies.fewstep_sheet import FewStepSheet, project_paths
from eval.studies.options import DrawingOptions
from infra.codec import from_json
from infra.errors import UserError
from infra.results import ResultRow, ResultStore

METRICS = ("fid", "clip_score", "geneval", "diversity", "saturation")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher, a baked student that has the teacher's own tensors, and another student; measured."""
    root = tmp_path_factory.mktemp("fewstep") / "runs"

    def place(run, **changes):
        return export(
            root / run / "weights" / "step_0000010" / "ema.safetensors", run=run, recipe_hash=f"{run}-hash", **changes
        )

    teacher = hashlib.sha256(place("teacher").read_bytes()).hexdigest()
    told = {"objective": "reflow", "round": 1, "teacher": teacher, "solver": "euler"}
    place("same", few_step=told | {"guidance": 3.0, "guidance_kind": "baked"})
    place("other", seed=1, few_step=told | {"guidance": 1.0, "guidance_kind": "kept"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.metrics.fid.REFERENCES", 40)
        measure_few_steps(options_for(root))
        yield root


def options_for(root, **changes):
    settings = {
        "steps": (1, 2), "guidance": (1.0, 3.0), "captions": 4, "prompts_per_task": 1, "images_per_prompt": 2,
        "flows": 2, "repeats": 1, "speed_batch": 2, "shown": 2,
        "drawing": DrawingOptions(precision="fp32", device="cpu", batch=16),
    }  # fmt: skip
    return FewStepOptions(str(root), **(settings | changes))


def read_rows(root, run):
    return {row.metric: row for row in ResultStore(str(root / run / "results")).rows(prefix="fewstep")}


def test_a_student_with_its_teachers_tensors_gets_its_teachers_numbers(runs):
    teacher, same, other = (read_rows(runs, run) for run in ("teacher", "same", "other"))
    shared = {name for name in teacher if "x1.0" in name or name.startswith("fewstep/flow/1.0")}
    assert set(same) == shared, "guidance 3 is baked in, so no other is drawn"
    assert set(other) == set(teacher)
    for name in shared:
        if "/seconds/" not in name:
            assert (same[name].value, same[name].low) == (teacher[name].value, teacher[name].low), name
            assert same[name].protocol_hash == teacher[name].protocol_hash
    assert other["fewstep/2x1.0/world_fid"].value != teacher["fewstep/2x1.0/world_fid"].value
    assert all(math.isfinite(row.value) for row in teacher.values())


def test_every_figure_is_there_for_every_setting(runs):
    rows = read_rows(runs, "teacher")
    for setting in ("1x1.0", "2x1.0", "1x3.0", "2x3.0"):
        found = {name.split("/", 2)[2] for name in rows if name.startswith(f"fewstep/{setting}/")}
        assert {f"world_{name}" for name in ("fid", "clip_score", "diversity", "saturation")} < found
        assert {"world_geneval/overall/seen", "world_saturation/contrast", "seconds/latents"} < found
        assert ("clip_loss" in found) == setting.startswith("1x"), "against the most steps"
        latents, pictures = (rows[f"fewstep/{setting}/seconds/{name}"].value for name in ("latents", "pictures"))
        assert 0 < latents < pictures
    least = rows["fewstep/1x1.0/clip_loss"]
    few, most = (rows[f"fewstep/{steps}x1.0/world_clip_score"].value for steps in (1, 2))
    assert least.value == pytest.approx(100 * (1 - few / most))
    assert least.low <= least.value <= least.high


def test_straightness_by_t_averages_to_the_whole(runs):
    rows = read_rows(runs, "teacher")
    for name in ("straightness", "length", "bend"):
        whole = rows[f"fewstep/flow/1.0/{name}"]
        by_t = [row.value for key, row in rows.items() if key.startswith(f"fewstep/flow/1.0/{name}/t")]
        assert len(by_t) == 8
        assert np.mean(by_t) == pytest.approx(whole.value)
    assert rows["fewstep/flow/1.0/length"].value > 1, "no path is shorter than the straight way"


def test_a_second_call_measures_and_draws_nothing(runs):
    files = {file: file.stat().st_mtime_ns for file in runs.rglob("*") if file.is_file()}
    measure_few_steps(options_for(runs))
    assert {file: file.stat().st_mtime_ns for file in runs.rglob("*") if file.is_file()} == files
    few = sum(1 for file in files if "results" in file.parts and file.suffix == ".jsonl")
    measure_few_steps(options_for(runs, steps=(1,), guidance=(1.0,), repeats=0, flows=0))
    again = list(runs.rglob("results/*.jsonl"))
    assert len(again) == few, "fewer settings are all there"


def test_the_sheet_says_what_its_tiles_are(runs):
    files = (runs / "same" / "fewstep").glob("*-same-hash-1000.json")
    sheets = {file: from_json(FewStepSheet, file.read_bytes(), where=str(file)) for file in files}
    (file, sheet), *_ = [item for item in sheets.items() if item[1].settings == [(1, 1.0), (2, 1.0)]]
    assert sheet.student["guidance_kind"] == "baked"
    own = hashlib.sha256((runs / "teacher/weights/step_0000010/ema.safetensors").read_bytes()).hexdigest()
    assert sheet.student["teacher"] == own
    from PIL import Image

    with Image.open(file.with_suffix(".png")) as picture:
        assert picture.size == (sheet.tile[0] * len(sheet.prompts), sheet.tile[1] * len(sheet.settings))
    (flow,) = sheet.flows
    assert [path[0] for path in flow.along] == [0.0] * len(sheet.prompts)
    assert [path[-1] for path in flow.along] == pytest.approx([1.0] * len(sheet.prompts))
    assert [path[-1] for path in flow.aside] == pytest.approx([0.0] * len(sheet.prompts), abs=1e-6)


def test_settings_without_a_meaning_are_refused(tmp_path):
    for changes, told in (
        ({"steps": (2, 2)}, "--steps"), ({"steps": (0,)}, "--steps"), ({"guidance": ()}, "--guidance"),
        ({"metrics": ("fidd",)}, "unknown metric"), ({"flows": 1}, "--flows"), ({"repeats": -1}, "--repeats"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=told):
            measure_few_steps(options_for(tmp_path, **changes))


def test_guidance_that_no_setting_leaves_to_a_student_says_why(runs, tmp_path):
    import shutil

    shutil.copytree(runs / "same", tmp_path / "same")
    with pytest.raises(UserError, match="1 of 1 runs"):
        measure_few_steps(options_for(tmp_path, guidance=(3.0,)))


def test_projected_paths_of_known_shapes():
    angle = torch.linspace(0, torch.pi, 5, dtype=torch.float64)
    half_circle = torch.stack([1 - angle.cos(), torch.zeros(5).double(), -angle.sin()], dim=1) / 2
    line = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None] * torch.tensor([1.0, 2.0, -2.0])
    along, aside = project_paths(torch.stack([half_circle, line + 7]))
    torch.testing.assert_close(along[0], (1 - angle.cos()) / 2)
    torch.testing.assert_close(aside[0], angle.sin() / 2)
    torch.testing.assert_close(along[1], torch.linspace(0, 1, 5, dtype=torch.float64))
    torch.testing.assert_close(aside[1], torch.zeros(5).double())


def test_diversity_is_the_mean_over_pairs_of_a_prompt():
    judges = build_judges("world")
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 3, 64, 64, 3), dtype=np.uint8)
    metric = Diversity(judges)
    assert metric.compute() == []
    prompt = Prompt("a dog", "single_object")
    for number in range(3):  # batches cut through a prompt's pictures
        metric.update([JudgedImage(prompt, index, pictures[index, number]) for index in range(2)])
    features = torch.nn.functional.normalize(judges.clip().images(list(pictures.reshape(6, 64, 64, 3))), dim=1)
    rows = features.view(2, 3, -1)
    pairs = [1 - float(rows[p, i] @ rows[p, j]) for p in range(2) for i, j in itertools.combinations(range(3), 2)]
    (score,) = metric.compute()
    assert (score.value, score.sample_count) == (pytest.approx(np.mean(pairs), abs=1e-6), 6)
    alike = Diversity(judges)
    alike.update([JudgedImage(prompt, 0, pictures[0, 0])] * 4)
    assert alike.compute()[0].value == pytest.approx(0, abs=1e-6)


def test_saturation_is_that_of_hsv_and_contrast_a_deviation():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    expected = np.mean([colorsys.rgb_to_hsv(*(pixel / 255))[1] for pixel in image.reshape(-1, 3)])
    assert measure_saturation(image) == pytest.approx(expected)
    half = np.zeros((4, 4, 3), dtype=np.uint8)
    half[:2] = 255
    assert (measure_saturation(half), measure_contrast(half)) == (0, pytest.approx(0.5))
    metric = Saturation(build_judges("world"))
    metric.update([JudgedImage(Prompt("a", "captions"), 0, half)])
    assert {score.path: score.value for score in metric.compute()} == {"": 0, "contrast": pytest.approx(0.5)}


def test_what_is_stored_of_a_measurement_can_be_compared_by_prompt(runs):
    row = read_rows(runs, "teacher")["fewstep/2x1.0/world_clip_score"]
    kept = list((runs / "teacher" / "results" / "values" / row.protocol_hash).glob("*.npz"))
    assert len(kept) == 1
    protocol = json.loads((runs / "teacher/results/protocols" / f"{row.protocol_hash}.json").read_text())
    assert (protocol["sampling"]["steps"], protocol["sampling"]["guidance"]) == (2, 1.0)


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    write_report(str(runs), str(out))
    return out


def test_the_report_has_a_page_of_few_steps(runs, page):
    told = json.loads((page / "few_steps.json").read_text())
    names = [(line["run"], line["guidance"], line["teacher"]) for line in told["lines"]]
    assert names[0] == ("teacher", 1.0, None), "the teacher comes first"
    assert {("same", 1.0, "teacher"), ("other", 3.0, "teacher"), ("teacher", 3.0, None)} < set(names)
    lines = {(line["run"], line["guidance"]): line for line in told["lines"]}
    assert lines["same", 1.0]["kind"] == "reflow, round 1, guidance 3 baked in"
    assert lines["teacher", 1.0]["kind"] == "teacher"
    row = read_rows(runs, "other")["fewstep/2x3.0/world_fid"]
    cell = lines["other", 3.0]["cells"]["2"]["fid"]
    assert (cell["value"], cell["low"], cell["high"]) == (row.value, row.low, row.high)
    assert told["protocols"]["fewstep/2x3.0/world_fid"] == row.protocol_hash
    figures = {file.stem for file in (page / "figures").glob("fewstep_*.svg")}
    assert figures == {f"fewstep_{name}" for name in ("quality", "time", "flow", "paths", "strips")}
    html, markdown = ((page / f"few_steps.{kind}").read_text() for kind in ("html", "md"))
    assert html.count('<div class="wide"><svg') == 5
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html), "nothing comes from elsewhere"
    assert all(f"figures/{name}.png" in markdown for name in figures)
    assert 'href="few_steps.html"' in (page / "report.html").read_text()
    scores = json.loads((page / "report.json").read_text())["scores"]
    assert not any(name.startswith("fewstep") for name in scores), "its rows are no scores of the ladder"


def test_a_students_numbers_are_told_apart_only_beyond_the_intervals(page):
    found = json.loads((page / "few_steps.json").read_text())["findings"]
    same = [line for line in found if line.startswith("FID") and ": same at guidance 1 has" in line]
    assert len(same) == 2
    assert all(line.endswith("not told apart.") for line in same), "the same tensors"
    better = [make_line("student", 1.0), make_line("teacher", 3.0)]
    assert compose_findings(better, {"fid": False}) == [
        "FID in 1 step: student at guidance 1 has 1 (0.5 to 1.5), teacher at guidance 1 has 3 (2.5 to 3.5): better by "
        "more than the intervals."
    ]
    near = [make_line("student", 3.2), make_line("teacher", 3.0)]
    assert compose_findings(near, {"fid": False})[0].endswith("not told apart.")
    worse = [make_line("student", 5.0), make_line("teacher", 3.0)]
    assert compose_findings(worse, {"fid": False})[0].endswith("worse by more than the intervals.")


def make_line(run, fid):
    cells = {1: {"fid": MetricPoint(10, fid, fid - 0.5, fid + 0.5, 4)}}
    return FewStepLine(run, run, "", 1.0, "teacher" if run == "student" else None, cells, {})


def test_strips_are_cut_where_the_sheet_says(runs):
    analysed = read_runs(str(runs))
    shown = compose_page(compose(analysed.runs), analysed.runs)
    (prompt, block), *_ = cut_strips(shown.strips)
    assert prompt == shown.strips[0].prompt
    tiles = dict(block)
    from eval.drawing.generate import ImageRequest, Painter, Sampling

    painter = Painter(runs / "teacher/weights/step_0000010/ema.safetensors")
    request = ImageRequest(prompt, "0")
    ((_, image),) = painter.paint([request], Sampling(steps=1, guidance=3.0, precision="fp32"))
    shown = tiles["teacher, guidance 3"][1].astype(int)
    assert np.abs(shown - image.astype(int)).max() <= 1, "drawn in another batch"
    assert (tiles["same, guidance 1"][2] == tiles["teacher, guidance 1"][2]).all()


def test_a_report_without_such_rows_has_no_such_page(tmp_path):
    write_ladder(str(tmp_path / "runs"), depths=(2, 3))
    analysed = read_runs(str(tmp_path / "runs"))
    assert compose(analysed.runs) is None


def compose(runs):
    return compose_few_steps(runs, compare_few_steps(runs), {run.name: run.name for run in runs})


# --- the live service


def test_the_service_shows_the_report_s_own_page(runs, page):
    from eval_service_runs import app_on
    from openapi import CheckedClient

    client = CheckedClient(app_on(str(runs)), base_url="http://127.0.0.1")
    shown = client.get("/api/few_steps").json()["page"]
    assert shown["found"] == json.loads((page / "few_steps.json").read_text())
    assert [chart["name"] for chart in shown["charts"]] == ["fewstep_quality", "fewstep_time", "fewstep_flow"]
    row = next(row for row in shown["strips"][0]["rows"] if row["run"] == "same")
    picture = client.get("/api/picture", params={"run": "same", "file": row["picture"], "width": 2400})
    assert picture.status_code == 200
    only = client.get("/api/few_steps", params={"run": "other"}).json()["page"]["found"]["lines"]
    assert {line["run"] for line in only} == {"other"}


def test_the_service_says_where_nothing_was_measured(tmp_path):
    from eval_service_runs import app_on
    from openapi import CheckedClient

    write_ladder(str(tmp_path / "runs"), depths=(2, 3))
    client = CheckedClient(app_on(str(tmp_path / "runs")), base_url="http://127.0.0.1")
    assert client.get("/api/few_steps").json() == {"page": None}


# --- means over seeds


def fake_run(name, *, seed, values, recipe=()):
    """A run with rows alone: steps -> FID, its interval over prompts from half to twice of it."""
    judged = (("fid", False, values), ("geneval/overall/seen", True, dict.fromkeys(values, 0.0)))
    rows = tuple(
        ResultRow(name, "hash", "v", 1000, f"fewstep/{steps}x1.0/world_{figure}", value, higher, 8, "protocol",
                  low=value / 2, high=2 * value)
        for figure, higher, found in judged
        for steps, value in found.items()
    )  # fmt: skip
    return RunFolder(name, name, {"seed": seed, "optimizer": {"lr": 1e-3}} | dict(recipe), {}, rows, ())


def test_runs_that_differ_in_their_seed_alone_are_one_arm():
    values = (10.0, 12.0, 17.0)
    runs = [fake_run(f"seed{n}/reflow", seed=n, values={1: v, 2: 5.0}) for n, v in enumerate(values)]
    found = compose([*runs, fake_run("teacher", seed=0, values={1: 30.0})])
    arm, teacher = found.lines
    assert (arm.run, arm.label, arm.runs) == ("reflow", "reflow (3 seeds)", tuple(run.name for run in runs))
    assert [line.run for line in found.members] == [run.name for run in runs]
    cell = arm.cells[1]["fid"]
    half = 4.302653 * np.std(values, ddof=1) / math.sqrt(3)  # the 97.5 % point of Student's t with 2 degrees of freedom
    assert (cell.value, cell.count) == (13, 3)
    assert (cell.low, cell.high) == (pytest.approx(13 - half), pytest.approx(13 + half))
    assert (arm.cells[2]["fid"].low, arm.cells[2]["fid"].high) == (5, 5), "no spread over seeds"
    assert (arm.over_prompts[2]["fid"].low, arm.over_prompts[2]["fid"].high) == (2.5, 10), "the other interval"
    assert (arm.find_widest(2, "fid").low, arm.find_widest(2, "fid").high) == (2.5, 10)
    assert (teacher.label, teacher.cells[1]["fid"].low, teacher.over_prompts) == ("teacher", 15, {})


def test_another_recipe_makes_another_arm():
    alike = [fake_run(f"reflow-seed{n}", seed=n, values={1: 1.0 + n}) for n in range(2)]
    assert len(compose(alike).lines) == 1
    from_others = [fake_run(f"reflow-seed{n}", seed=n, values={1: 1.0}, recipe={"init_weights": n}) for n in range(2)]
    assert len(compose(from_others).lines) == 1, "students of teachers of several seeds"
    again = [fake_run("reflow", seed=0, values={1: 1.0}), fake_run("seed0/reflow", seed=0, values={1: 1.0})]
    assert len(compose(again).lines) == 2, "the same seed twice tells nothing of seeds"
    other = fake_run("reflow-seed2", seed=2, values={1: 1.0}, recipe={"optimizer": {"lr": 1e-4}})
    assert [line.run for line in compose([*alike, other]).lines] == ["reflow-seed0", "reflow-seed1", "reflow-seed2"]
    names = ["seed1/reflow", "reflow-seed10", "a/seed2/b", "seed3", "linseed4", "reseed5/x"]
    assert [name_arm(name) for name in names] == ["reflow", "reflow", "a/b", "seed3", "linseed4", "reseed5/x"]


def test_the_mean_of_intervals_is_none_where_one_has_none():
    points = [MetricPoint(1, 1.0, None, None, 4), MetricPoint(1, 3.0, 2.0, 4.0, 4)]
    over_seeds, over_prompts = average_points(points)
    assert (over_seeds.value, over_seeds.count) == (2, 2)
    assert (over_prompts.low, over_prompts.high, over_prompts.count) == (None, None, 4)


def test_the_page_tells_means_from_single_runs():
    runs = [fake_run(f"seed{n}/reflow", seed=n, values={1: 10.0 + 2 * n}) for n in range(2)]
    context = make_few_steps_context(compose_page(compose(runs), runs), [], source="RUNS")
    html = render_page("few_steps.html", context)
    means, _, single = html.partition("<details>")
    assert "reflow (2 seeds), guidance 1" in means
    assert "seed0/reflow" not in means
    assert single.count("/reflow, guidance 1</td>") == 2
    told = render_page("few_steps.md", context)
    assert "| 1 | reflow (2 seeds), guidance 1 | 11 (-1.7 to 24) |" in told  # 11 +- 12.7 * 1
    assert "| 1 | seed0/reflow, guidance 1 | 10 (5 to 20) |" in told
    alone = make_few_steps_context(compose_page(compose(runs[:1]), runs[:1]), [], source="RUNS")
    assert "seeds" not in render_page("few_steps.md", alone)


def test_scores_that_are_all_zero_have_an_axis_from_zero_up():
    import matplotlib.pyplot as plt

    runs = [fake_run(f"seed{n}/reflow", seed=n, values={1: 3.0 + n, 2: 2.0}) for n in range(2)]
    chart = compose_page(compose(runs), runs).charts[0]
    assert [panel.title for panel in chart.panels] == ["FID", "GenEval, seen"]
    assert chart.panels[0].lines[0].low[1] == 2
    figure = plot_chart(chart)(make_themes(1)[0], False)
    assert figure.axes[1].get_ylim() == (0, 0.1)
    assert figure.axes[0].get_ylim()[0] < 2
    assert len(figure.axes[0].collections) == 1, "intervals over seeds are drawn"
    plt.close(figure)


def test_a_student_is_set_against_its_teacher_at_the_guidance_that_taught_it():
    def line(name, guidance, value, **more):
        point = MetricPoint(1, value, None, None, 4)
        made = dataclasses.replace(make_line(name, 1.0), guidance=guidance, **more)
        return dataclasses.replace(made, flow={"straightness": point}, cells={1: {"saturation": point}})

    teachers = [line("teacher", guidance, value) for guidance, value in ((1.0, 10.0), (1.5, 20.0))]
    baked = line("reflow", 1.0, 5.0, teacher="teacher", baked_guidance=1.5)
    said = " ".join(compose_findings([*teachers, baked], {}))
    assert "teacher at guidance 1.5 has 20" in said
    assert "0.25 times the teacher's" in said
    assert "teacher at guidance 1 " not in said


def test_students_are_compared_by_what_they_started_from():
    direct, after = (
        dataclasses.replace(make_line(name, fid), teacher="teacher", objective="distil", origin=origin)
        for name, fid, origin in (("direct", 8.0, "teacher"), ("after", 4.0, "reflow"))
    )
    assert compose_findings([direct, after], {"fid": False}) == [
        "FID in 1 step: after at guidance 1 has 4 (3.5 to 4.5), direct at guidance 1 has 8 (7.5 to 8.5): better by "
        "more than the intervals."
    ]
