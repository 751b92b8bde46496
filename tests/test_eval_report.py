"""The report: complete from good runs, smaller from bad ones; protocols are never mixed, names never trusted."""

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from eval_runs import LAW, grid, write_calibration, write_ladder, write_run

from eval.report.analysis import analyse, label_runs
from eval.report.build import make_page_context, render_files, render_page, write_report
from eval.report.document import compose_report, encode_report, read_report
from eval.report.figures import draw_figures
from eval.report.findings import describe_scores
from eval.report.headline import HeadlineNumber, choose_headlines
from eval.report.labels import PlotLine, spread_apart
from eval.report.plots import plot_loss_curves, render
from eval.report.runs import read_runs
from eval.report.series import Comparison, MetricPoint, ScoreTask
from eval.report.style import choose_log_ticks, mix_ramp
from eval.report.text import escape_markdown, format_count, format_duration, format_power
from infra import storage
from infra.codec import to_json
from infra.errors import UserError
from infra.results import ResultStore

RUNS = Path(__file__).parents[1] / "infra" / "docs" / "runs"
NASTY = "<img src=x onerror=alert(1)>|`$x_1$&"


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """A three-rung ladder and its written report."""
    root = tmp_path_factory.mktemp("ladder")
    write_ladder(str(root / "runs"))
    return write_report(str(root / "runs"), str(root / "report"))


def words(report) -> str:
    return "\n".join(finding.text for finding in report.findings)


def page(report) -> str:
    """The page without drawings (drawing is what takes time)."""
    return render_page("report.html", make_page_context(report, compose_report(report), []))


def test_a_ladder_gives_page_figures_numbers_and_markdown(ladder):
    folder = ladder.parent
    told = json.loads((folder / "report.json").read_text())
    names = {p.stem for p in (folder / "figures").glob("*.svg")}
    assert {"loss_images", "loss_compute", "loss_levels", "progress", "correlation"} <= names
    assert {"scores_world_geneval", "scores_world_compbench"} <= names
    assert "law" not in names
    assert {p.stem for p in (folder / "figures").glob("*.png")} == names | {f"{name}-dark" for name in names}
    for file in (folder / "figures").glob("*.svg"):
        ET.parse(file)
    assert [run["label"] for run in told["runs"]] == ["depth 2", "depth 3", "depth 4"]
    assert "3 model sizes" in told["scaling"]["reason"]
    html, markdown = ladder.read_text(), (folder / "report.md").read_text()
    for text in (html, markdown):
        assert "No scaling law is drawn: 3 model sizes" in text
        assert "ground truth 0.97, shuffled 0.04" in text
        assert "Larger is better at every step of the ladder" in text
    assert "| metric | runs | at images | Pearson | Spearman | within runs |" in markdown
    line = next(line for line in markdown.splitlines() if line.startswith("| world_geneval/overall/seen | 3 |"))
    found = next(c for c in told["correlations"] if c["metric"] == "world_geneval/overall/seen")
    assert line.count(" | ") == 5
    assert f" | {found['within_runs']['pearson']['value']:+.2f} (" in line
    assert "optimizer.lr" in html
    assert all(f"figures/{name}.png" in markdown for name in names)
    assert html.count("data:image/webp;base64,") == 3 + 3  # one grid per rung, three steps of the deepest


def test_what_is_written_is_read_back_as_the_same_types(ladder):
    report = read_report(str(ladder.parent / "report.json"))
    assert report.runs[0].cost.images == 12_000
    assert report.losses["world-d4"][-1].value < report.losses["world-d2"][-1].value
    assert report.scores["world_geneval"][0].runs["world-d2"].low is not None
    assert encode_report(report) == (ladder.parent / "report.json").read_bytes()


@pytest.mark.parametrize("file", sorted(RUNS.rglob("report.json")), ids=lambda file: str(file.parent.name))
def test_committed_reports_are_read(file):
    if file.parent.name != "true_size":  # that one is the trainer's: a plan beside what was measured
        assert encode_report(read_report(str(file))) == file.read_bytes()


def test_whole_numbers_of_a_plan_are_written_as_they_are_read_again(ladder, tmp_path):
    report = read_report(str(ladder.parent / "report.json"))
    planned = replace(report, runs=[replace(report.runs[0], train_flops_per_image=3), *report.runs[1:]])
    (tmp_path / "report.json").write_bytes(encode_report(planned))
    assert encode_report(read_report(str(tmp_path / "report.json"))) == encode_report(planned)


def test_a_report_that_is_none_is_refused_with_the_place(ladder, tmp_path):
    told = json.loads((ladder.parent / "report.json").read_text())
    told["runs"][0]["cost"]["images"] = "many"
    (tmp_path / "report.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"runs\.0\.cost\.images is 'many', expected an integer: .*write it again"):
        read_report(str(tmp_path / "report.json"))


def test_numbers_that_are_not_finite_become_null_and_come_back_as_nan(tmp_path):
    uri = write_run(str(tmp_path), 2, samples=False)
    recipe = json.loads(storage.read_bytes(f"{uri}/recipe.json"))
    storage.write_bytes(f"{uri}/recipe.json", json.dumps(recipe | {"odd": float("inf")}).encode())
    row = ResultStore(f"{uri}/results").rows(metric="world_fid")[-1]
    odd = [replace(row, metric="world_odd/overall", value=float("nan")), replace(row, metric="m", low=float("nan"))]
    ResultStore(f"{uri}/results").append(odd)
    analysis = analyse(read_runs(str(tmp_path)))
    assert "world_odd" not in analysis.families
    (tmp_path / "report.json").write_bytes(encode_report(compose_report(analysis)))
    report = read_report(str(tmp_path / "report.json"))
    assert report.runs[0].recipe["odd"] is None
    assert report.scores["m"][0].runs["world-d2"].low is None


def test_a_missing_correlation_names_its_metric(tmp_path):
    for depth in (2, 3, 4):
        write_run(str(tmp_path), depth, samples=False, checkpoints=1)
    report = analyse(read_runs(str(tmp_path)))
    told = to_json(compose_report(report))["correlations"]
    reason = told[0]["within_runs"]["reason"]
    names = ", ".join(line["metric"] for line in told if line["within_runs"]["reason"] == reason)
    markdown = " ".join(render_files(report, [])["report.md"].decode().split())  # however its lines break
    assert all(f"Within runs, {names}: {reason}." in text for text in (page(report), markdown))


def test_the_page_is_self_contained(ladder):
    html = ladder.read_text()
    assert "<script" not in html
    assert "default-src 'none'" in html
    links = re.findall(r'(?:\bsrc|\bhref)="([^"]+)"', html) + re.findall(r"url\(([^)]+)\)", html)
    assert all(link.startswith(("#", "data:")) for link in links), links
    namespaces = set(re.findall(r"https?://[^\"' <)]+", html))
    assert all(url.startswith("http://www.w3.org/") for url in namespaces), namespaces
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_names_prompts_and_captions_are_data(tmp_path):
    root = tmp_path / "runs"
    write_run(str(root), 2, name="world-d2")
    uri = write_run(str(root), 3, name="odd")
    recipe = json.loads(storage.read_bytes(f"{uri}/recipe.json"))
    recipe["model"]["depth"], recipe[NASTY] = 2, NASTY  # the same depth twice: runs are labelled by name
    storage.write_bytes(f"{uri}/recipe.json", json.dumps(recipe).encode())
    for file in storage.list_files(f"{uri}/samples", suffix=".json"):
        storage.write_bytes(file, json.dumps({"prompts": [NASTY, "</li><script>alert(2)</script>"]}).encode())
    (root / "odd").rename(root / NASTY.replace("/", ""))
    report = analyse(read_runs(str(root)))
    html = page(report)
    assert "<img src=x" not in html
    assert "<script" not in html
    assert "&lt;img src=x onerror=alert(1)&gt;" in html
    assert "&lt;script&gt;alert(2)" in html
    lines = [PlotLine(NASTY, 0, (1.0, 2.0), (3.0, 2.0))]
    draw = plot_loss_curves(lines, xlabel="images", compute=False, ylabel="loss")
    drawn = render("loss", draw, alt=NASTY, caption=NASTY, num_series=1)
    texts = [element.text for element in ET.fromstring(drawn.wide_svg).iter() if element.tag.endswith("text")]
    assert NASTY in texts
    context = make_page_context(report, compose_report(report), [drawn])
    markdown = render_page("report.md", context)
    assert re.search(r"(?<!\\)<", markdown) is None
    assert "<img src=x" not in render_page("report.html", context)
    assert escape_markdown(f"a\nb {NASTY}") == r"a b \<img src=x onerror=alert(1)\>\|\`\$x_1\$&"


def test_five_sizes_give_a_law_a_prediction_and_a_back_test(tmp_path):
    write_ladder(str(tmp_path), (2, 3, 4, 6, 8), images=400_000, noise=0.0005, samples=False)
    report = analyse(read_runs(str(tmp_path)))
    scaling = report.fit.summary
    assert scaling.reason is None
    assert scaling.laws["L(N)"].exponents[0].low < LAW["alpha"] < scaling.laws["L(N)"].exponents[0].high
    assert scaling.laws["L(N,D)"].exponents[1].value == pytest.approx(LAW["beta"], rel=0.05)
    frontier = LAW["alpha"] * LAW["beta"] / (LAW["alpha"] + LAW["beta"])  # FLOPs are parameters times images here
    assert scaling.laws["L(C)"].exponents[0].low < frontier < scaling.laws["L(C)"].exponents[0].high
    assert "best size for each C" in page(report)
    markdown = render_files(report, [])["report.md"].decode()
    assert all("N is the exact number of" in text for text in (page(report), markdown))
    assert scaling.next_rung.depth == 10
    assert scaling.next_rung.loss.low < scaling.next_rung.loss.value < scaling.next_rung.loss.high
    assert scaling.held_out.depth == 8
    assert scaling.held_out.inside
    assert "Prediction for depth 10" in words(report)
    assert "Asked without depth 8" in page(report)
    assert all(c.across_runs.pearson.low is not None for c in report.correlations)


def edit(file: Path, **changes) -> None:
    """Replace fields of a recipe; a mapping's own fields one by one."""
    told = json.loads(file.read_text())
    for name, value in changes.items():
        told[name] = {**told[name], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(told))


def test_a_law_is_of_one_backbone_and_says_what_else_differs_under_it(tmp_path):
    write_ladder(str(tmp_path), (2, 3, 4, 6), images=100_000, samples=False, scored=False)
    alone = analyse(read_runs(str(tmp_path))).fit.summary
    assert (alone.reason, alone.notes, alone.equal_ends) == (None, (), True)
    for depth in (1, 5, 8):
        write_run(str(tmp_path), depth, name=f"dit-d{depth}", images=100_000, samples=False, scored=False)
        edit(tmp_path / f"dit-d{depth}" / "recipe.json", model={"backbone": "dit"})
    report = analyse(read_runs(str(tmp_path)))
    assert [curve.run for curve in report.fit.curves] == [f"world-d{depth}" for depth in (2, 3, 4, 6)]
    assert report.fit.summary.laws["L(N)"] == alone.laws["L(N)"]
    assert "The law is of mmdit alone; other backbones are not under it: dit (dit-d1, dit-d5, dit-d8)." in words(report)
    write_run(str(tmp_path), 4, name="hot", images=50_000, seed=1, samples=False, scored=False)
    edit(tmp_path / "hot" / "recipe.json", optimizer={"lr": 5e-3}, seed=1)
    report = analyse(read_runs(str(tmp_path)))
    assert "differ in more than their seed (optimizer.lr)" in words(report)
    assert "The runs end at different images, 50k to 100k" in page(report)
    assert not report.fit.summary.equal_ends


def test_losses_that_are_no_numbers_and_unstable_ends_are_told_and_left_out(tmp_path):
    write_ladder(str(tmp_path / "runs"), (2, 3, 4, 6), samples=False, scored=False)
    store = ResultStore(str(tmp_path / "runs" / "world-d6" / "results"))
    ends = store.rows(metric="val_loss/sd3")[-4:]
    later = "2999-01-01T00:00:00.000+00:00"
    bad = (float("nan"), float("inf"), 0.0, -1.0)
    store.append([replace(row, value=value, created=later) for row, value in zip(ends, bad, strict=True)])
    (tmp_path / "runs" / "world-d6" / "unstable.json").write_text('{"problem": "loss nan", "images": 9000}')
    (tmp_path / "runs" / "world-d2" / "unstable.json").write_text("{")
    report = analyse(read_runs(str(tmp_path / "runs")))
    assert len(report.losses.points["world-d6"]) == 12 - 4
    said = "\n".join(report.missing)
    assert "depth 6 (world-d6): no usable validation loss at 4 of its checkpoints" in said
    assert "depth 6 (world-d6): no stable end (loss nan)" in said
    assert "depth 2 (world-d2): no stable end (unstable)" in said
    told = write_report(str(tmp_path / "runs"), str(tmp_path / "out")).read_text()
    assert "no usable validation loss" in told


def test_numbers_under_other_protocols_are_not_compared(tmp_path):
    for depth in (2, 3):
        write_run(str(tmp_path), depth)
    write_run(str(tmp_path), 4, protocol="p2")
    report = analyse(read_runs(str(tmp_path)))
    metric = "world_geneval/overall/seen"
    assert set(report.found[metric].points) == {"world-d2", "world-d3"}
    assert [left.run for left in report.found[metric].left_out] == ["world-d4"]
    assert "Not compared" in words(report)
    assert set(report.losses.points) == {"world-d2", "world-d3", "world-d4"}  # its losses are under the same protocol
    text = page(report)
    assert "Not compared" in text
    assert report.found[metric].left_out[0].protocol in text


def test_the_papers_points_stand_beside_the_official_benchmark_only(tmp_path):
    uri = write_run(str(tmp_path), 2, samples=False)
    world = analyse(read_runs(str(tmp_path)))
    assert not any("SD3" in figure.wide_svg for figure in draw_figures(world))
    official = [
        replace(row, metric=row.metric.removeprefix("world_").removesuffix("/seen"))
        for row in world.runs[0].rows
        if row.metric.startswith("world_geneval/") and row.metric.endswith("/seen")
    ]
    ResultStore(uri + "/results").append(official)
    drawn = {figure.name: figure for figure in draw_figures(analyse(read_runs(str(tmp_path))))}
    assert "SD3 depth 38" in drawn["scores_geneval"].wide_svg
    assert "other data" in drawn["scores_geneval"].caption
    assert "SD3" not in drawn["scores_world_geneval"].wide_svg


def test_missing_pieces_make_a_smaller_report_that_says_so(tmp_path):
    good = write_run(str(tmp_path), 2, scored=False)
    storage.write_bytes(f"{tmp_path}/empty/recipe.json", b'{"name": "empty", "model": {"depth": 3}}')
    storage.write_bytes(f"{tmp_path}/torn/plan.json", b'{"parameters": 12')
    storage.write_bytes(f"{tmp_path}/torn/results/abc.jsonl", b"{")
    storage.write_bytes(storage.list_files(f"{good}/samples", suffix=".png")[-1], b"not a picture")
    report = analyse(read_runs(str(tmp_path)))
    said = "\n".join(report.missing)
    assert "empty: no plan.json" in said
    assert "torn: no plan.json (unreadable" in said
    assert "torn: no readable result rows" in said
    assert "no scores" in said
    text = page(report)
    assert "cannot be shown" in text
    assert "What is missing" in text
    markdown = render_files(report, [])["report.md"].decode()
    assert "| empty | 4.92M | 0 |  |" in markdown, "a run without losses has a line, too"


def test_one_run_alone_and_the_run_folder_itself(tmp_path):
    uri = write_run(str(tmp_path), 4)
    for place in (str(tmp_path), uri):
        report = analyse(read_runs(place))
        assert [run.name for run in report.runs] == ["world-d4"]
        assert "only one run" in "\n".join(report.missing)
        assert "1 model size," in report.fit.summary.reason
        assert "Scaling report" in page(report)


def test_a_run_without_a_plan_still_has_its_loss(tmp_path):
    uri = write_run(str(tmp_path), 3, samples=False)
    Path(f"{uri}/plan.json").unlink()
    report = analyse(read_runs(str(tmp_path)))
    assert report.runs[0].parameters  # counted from the recipe's model
    assert "three validation losses together with its size" in report.fit.summary.reason
    assert "No figure against compute" in page(report)


def test_judges_that_cannot_judge_are_called_out(tmp_path):
    write_run(str(tmp_path), 2)
    write_calibration(str(tmp_path), truth=0.8, shuffled=0.02)
    assert "ground truth gets 0.80" in words(analyse(read_runs(str(tmp_path))))
    write_calibration(str(tmp_path), truth=0.97, shuffled=0.3)
    assert "shuffled gets 0.30" in words(analyse(read_runs(str(tmp_path))))


def test_noise_is_judged_and_its_figure_is_told(tmp_path):
    write_run(str(tmp_path), 2)
    write_calibration(str(tmp_path))
    told = analyse(read_runs(str(tmp_path)))
    assert "world_geneval/overall/seen gives ground truth 0.97, shuffled 0.04, noise 0.00" in words(told)
    for text in (page(told), render_files(told, [])["report.md"].decode()):
        assert "shuffled 0.04, noise 0.00" in text
    write_calibration(str(tmp_path), noise=0.2)
    assert "the judges see things in noise: noise gets 0.20, expected at most 0.05" in words(
        analyse(read_runs(str(tmp_path)))
    )


def test_seeds_of_one_size_are_separate_runs(tmp_path):
    for depth, seed in ((2, 0), (2, 1), (3, 0), (3, 1)):
        write_run(str(tmp_path), depth, seed=seed, name=f"d{depth}-s{seed}", samples=False)
    report = analyse(read_runs(str(tmp_path)))
    assert set(label_runs(report.runs).values()) == {"d2-s0", "d2-s1", "d3-s0", "d3-s1"}
    assert "2 model sizes" in report.fit.summary.reason
    assert all(c.across_runs.num_runs == 4 for c in report.correlations)


def test_runs_of_a_sweep_lie_deeper_and_are_named_by_their_path(tmp_path):
    for seed in (0, 1):
        uri = write_run(f"{tmp_path}/seed{seed}", 2, seed=seed, samples=False)
        storage.write_bytes(f"{uri}/checkpoints/step_1/recipe.json", b"{}")  # inside a run: no run of its own
    write_run(str(tmp_path), 3, samples=False)
    write_calibration(str(tmp_path))
    report = analyse(read_runs(str(tmp_path)))
    assert [run.name for run in report.runs] == ["seed0/world-d2", "seed1/world-d2", "world-d3"]
    assert all(report.losses.points[run.name] for run in report.runs)
    assert report.calibration


def test_nothing_to_report_on_is_one_line(tmp_path):
    for place in (tmp_path / "not-there", tmp_path):
        with pytest.raises(UserError, match="no runs there"):
            write_report(str(place), str(tmp_path / "out"))
    storage.write_bytes(f"{tmp_path}/photos/a.png", grid(2, 1.0))
    with pytest.raises(UserError, match="no run folder"):
        write_report(str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(UserError, match="local folder"):
        write_report(str(tmp_path), "s3://bucket/report")


def test_runs_on_s3_read_like_local_ones(s3, tmp_path):
    for root in (s3, str(tmp_path)):
        write_run(root, 2)
        write_calibration(root)
    remote, local = (analyse(read_runs(root)) for root in (s3, str(tmp_path)))
    assert [f.text for f in remote.findings] == [f.text for f in local.findings]
    assert "data:image/webp" in page(remote)


@pytest.mark.filterwarnings("error:constrained_layout not applied")
def test_more_runs_than_names_fit_leave_room_for_the_curves():
    """61 formulations, two seeds each: their names once pushed the axes to nothing."""
    lines = [PlotLine(f"run {i}", i, (1e3, 1e4), (1.0, 0.5 + i / 1000)) for i in range(122)]
    for compute in (False, True):
        draw = plot_loss_curves(lines, xlabel="images", compute=compute, ylabel="loss")
        drawn = render("loss", draw, alt="", caption="", num_series=len(lines))
        texts = [element.text for element in ET.fromstring(drawn.wide_svg).iter() if element.tag.endswith("text")]
        named = [text for text in texts if text and text.startswith("run ")]
        assert {"run 0", "run 121"} <= set(named)
        assert 8 <= len(named) <= 24
        assert ("... 98 more" in texts) == compute


@pytest.mark.parametrize(
    ("low", "high"), [(0.31, 0.38), (0.56, 1.2), (1e3, 1.2e4), (3e12, 4e13), (1e6, 1e9), (1.0, 1.0001), (0.1, 1000.0)]
)
def test_log_axes_have_a_few_round_ticks_inside(low, high):
    ticks = choose_log_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert all(low <= tick <= high for tick in ticks)


def test_small_words():
    assert [format_count(v) for v in (950, 12_000, 999_999, 1.5e6, 2e9)] == ["950", "12k", "1M", "1.5M", "2B"]
    assert format_power(1e14) == "10\u00b9\u2074"
    assert format_power(2.5e-3) == "2.5\u00d710\u207b\u00b3"
    assert [format_duration(s) for s in (5, 95, 7260, 200_000)] == ["5 s", "1 min 35 s", "2 h 01 min", "2 d 07 h"]
    assert spread_apart([1.0, 1.1, 5.0], 1.0) == pytest.approx([0.55, 1.55, 5.0])
    assert len(set(mix_ramp(("#000000", "#ffffff"), 7))) == 7


def test_runs_that_tie_share_the_first_place():
    def ends(metric, *values):
        points = {f"d{n}": [MetricPoint(12_000, v, v - 0.02, v + 0.1, 48)] for n, v in enumerate(values, start=2)}
        return Comparison(metric, "p", higher_is_better=True, points=points)

    found = {
        "m/overall/seen": ends("m/overall/seen", 0.0, 0.0417, 0.0417),
        "m/overall/unseen": ends("m/overall/unseen", 0.0, 0.0, 0.0125),
    }
    labels = {f"d{n}": f"depth {n}" for n in (2, 3, 4)}
    tasks = [ScoreTask("overall", {"seen": "m/overall/seen", "unseen": "m/overall/unseen"})]
    (finding,) = describe_scores("m", tasks, found, labels)
    assert finding.text == (
        "depth 3 and depth 4 share the highest m: 0.0417 (0.0217 to 0.142) on seen compositions, "
        "0 (-0.02 to 0.1) and 0.0125 (-0.0075 to 0.113) on unseen ones, at 12k images."
    )
    (number,) = choose_headlines(None, {"m": tasks}, found, {}, labels)
    assert number == HeadlineNumber("0.0417", "best m, seen compositions (depth 3 and depth 4)")
