"""One store in which every run is odd in its own way: each route answers as described, and the good run is as ever."""

import dataclasses
import json
import time

import pytest
from eval_runs import write_run
from eval_service_runs import app_on, write_gallery
from openapi import CheckedClient

from infra import storage
from infra.results import ResultRow, ResultStore

INF, NAN, HUGE, HALF = float("inf"), float("nan"), 10**400, "\ud800"
PLANS = [
    {"parameters": "1e6", "train_flops_per_image": "x", "images": "12", "predicted": {"seconds": "3", "x": None}},
    {"parameters": 1000.5}, {"parameters": INF}, {"parameters": HUGE}, {"train_flops_per_image": INF}, {"images": INF},
    {"images": HUGE}, {"train_flops": INF}, {"images": 1e300, "train_flops_per_image": 1e300}, {"predicted": [1, 2]},
    {"predicted": {"seconds": NAN, "bytes": -INF, "": 0}}, {"predicted": {"seconds": HUGE}},
    {"peak_flops_per_second": INF},
]  # fmt: skip
RECIPES = [
    {"model": {"depth": True}}, {"model": {"depth": 2.5}}, {"model": [1]}, {"images": INF}, {"images": NAN},
    {"images": 9.5},
    {"global_batch": INF}, {"global_batch": True}, {"a": {}, "b": [NAN, {"x": INF}], "c": None}, {f"k{HALF}": HALF},
]  # fmt: skip
ROWS = [
    {"value": INF}, {"value": NAN}, {"low": -INF, "high": INF}, {"low": NAN}, {"images_seen": -5},
    {"images_seen": 2**63 - 1}, {"images_seen": 2**63}, {"images_seen": True}, {"images_seen": 3.0}, {"value": "inf"},
    {"sample_count": True}, {"metric": "val_loss/sd3/tnan"}, {"metric": "val_loss/sd3/tinf"}, {"metric": ""},
    {"metric": "/"}, {"metric": "seen"}, {"metric": "a/x/seen/unseen"}, {"metric": "cost/seconds", "value": 0.0},
    {"metric": "cost/images_per_second", "value": INF}, {"metric": f"val_loss/{HALF}"}, {"protocol_hash": HALF},
    {"recipe_hash": HALF, "code_version": HALF}, {"metric": "world_geneval/overall/seen", "value": NAN},
]  # fmt: skip
STUDIES = {
    "plain": {}, "unasked": {"questions": []}, "unknown": {"questions": ["nope"]}, "letters": {"questions": "abc"},
    "empty": {"prompts": []}, "nulls": {"prompts": [None, 3]}, "far": {"a": {"run": 1, "step": INF}},
    "undated": {"created": None},
}  # fmt: skip
DETAILS = {"depth": 2, "backbone": "mmdit", "parameters": 5, "fitted_to": ["a"]}
PREDICTIONS = ({}, {"parameters": INF}, {"parameters": -1}, {"fitted_to": [1, None]}, {"depth": "3"})
GALLERIES = [{"tiles": []}, {"images_seen": INF}, {"tiles": [{"prompt": None, "seed": INF, "number": 1}]}]
ROW = ResultRow("one", "h", "v", 64, "val_loss/sd3", 1.0, False, 2, "p")


def put_rows(folder, *records):
    """As `ResultStore` names them, but with whatever stands in the records."""
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    storage.write_bytes(f"{folder}/results/{storage.sha256_hex(data)[:32]}.jsonl", data)


def rewrite(path, odd):
    path.write_text(json.dumps(json.loads(path.read_text()) | odd))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("odd")
    write_run(str(root), 2, name="good")
    for kind, oddities in (("plan", PLANS), ("recipe", RECIPES)):
        for number, odd in enumerate(oddities):
            write_run(str(root), 2, name=f"{kind}-{number}", scored=False, samples=number % 2 == 0)
            rewrite(root / f"{kind}-{number}" / f"{kind}.json", odd)
            write_gallery(f"{root}/{kind}-{number}", 100, shade=3)
    for number, odd in enumerate(ROWS):
        put_rows(f"{root}/row-{number}", dataclasses.asdict(ROW) | odd)
    for number, odd in enumerate(GALLERIES):
        write_run(str(root), 2, name=f"gallery-{number}", scored=False, samples=False)
        write_gallery(f"{root}/gallery-{number}", 100, shade=3)
        rewrite(root / f"gallery-{number}" / "gallery" / "step_0000100.json", odd)
    for number, torn in enumerate((b"[]", b"torn", b"null", b"\xff")):
        for file in ("plan.json", "recipe.json"):
            write_run(str(root), 2, name=f"torn-{number}-{file}", scored=False, samples=False)
            (root / f"torn-{number}-{file}" / file).write_bytes(torn)
    for name in ("\u00b2", "1\u00b2", "\u0663"):  # digits that int() refuses, and one that it takes
        write_run(str(root), 2, name=name, scored=False, samples=False)
        storage.write_bytes(f"{root}/{name}/samples/step_{name}.png", b"no picture")
    judged = [
        dataclasses.replace(ROW, metric=f"calibration/{metric}/{control}", value=value)
        for metric, value in (("world_geneval/overall", NAN), ("world_fid", INF), ("world_clip_score", 0.5))
        for control in ("ground_truth", "shuffled", "noise")
    ]
    ResultStore(f"{root}/results").append(judged)
    interval = {"metric": "prediction/val_loss/sd3/d2", "low": 0.5, "high": 2.0}
    told = [dataclasses.asdict(ROW) | interval | {"details": json.dumps(DETAILS | odd)} for odd in PREDICTIONS]
    put_rows(root, *told)
    sides = {side: {"run": "good", "step": step} for side, step in (("a", 100), ("b", 200))}
    study = {"prompts": ["p", 'says "x"'], "questions": ["aesthetics"], "gallery": "g", "secret": "s", "created": "t"}
    for name, odd in STUDIES.items():
        found = sides | study | {"name": name} | odd
        storage.write_bytes(f"{root}/human/study-{name}/study.json", json.dumps(found).encode())
    return str(root)


@pytest.fixture(scope="module")
def client(root):
    return CheckedClient(app_on(root), base_url="http://localhost")  # an internal error is raised here


def test_every_list_answers_as_described(client):
    for path in ("status", "runs", "recipes", "plans", "failures", "metrics", "calibration", "sheets", "levels"):
        assert client.get(f"/api/{path}").status_code == 200, path
    metrics = client.get("/api/metrics").json()["metrics"]
    for metric in (metric for metric in metrics if HALF not in metric):  # that can be in no address
        assert client.get("/api/series", params={"metric": metric}).status_code == 200, metric
    for family in client.get("/api/metrics").json()["families"]:
        assert client.get("/api/scores", params={"family": family}).status_code == 200, family


def test_every_run_answers_as_described(client):
    names = [run["name"] for run in client.get("/api/runs").json()["runs"]]
    assert len(names) >= 1 + len(PLANS) + len(RECIPES) + len(GALLERIES) + 8 + 3
    for name in names:
        assert client.get("/api/run", params={"name": name}).status_code == 200, name
        assert client.get("/api/prompts", params={"run": name}).status_code in (200, 404), name
    assert client.get("/api/prompts", params={"run": "gallery-1"}).status_code == 404


def test_the_good_run_is_as_it_is_alone(client, tmp_path):
    write_run(str(tmp_path), 2, name="good")
    alone = CheckedClient(app_on(str(tmp_path)), base_url="http://localhost")
    both = [c.get("/api/run", params={"name": "good"}).json() for c in (client, alone)]
    assert both[0] | {"last": ""} == both[1] | {"last": ""}
    both = [c.get("/api/plans", params={"run": "good"}).json() for c in (client, alone)]
    assert both[0] == both[1]


def test_a_fit_ends_whatever_is_stored(client):
    names = [run["name"] for run in client.get("/api/runs").json()["runs"]][:60]
    deadline = time.monotonic() + 120
    while (told := client.get("/api/scaling", params={"run": names}).json())["state"] == "fitting":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert "internal error" not in (told["scaling"]["reason"] or "")


def test_numbers_that_are_none_are_no_calibration(client):
    assert [line["metric"] for line in client.get("/api/calibration").json()["lines"]] == ["world_clip_score"]


def test_one_odd_study_hides_no_other(client):
    told = client.get("/api/human/studies").json()
    assert [study["name"] for study in told["studies"]] == ["plain"]
    unreadable = sorted(line.split("study-")[1].split("/")[0] for line in told["unreadable"])
    assert unreadable == sorted(set(STUDIES) - {"plain"}), "each is named, those with nothing to ask too"
    for name in STUDIES:
        for path in ("next", "results"):
            answer = client.get(f"/api/human/{path}", params={"study": name, "rater": "ann"})
            assert answer.status_code in (200, 400), name


@pytest.mark.parametrize(
    "body",
    [b'{"study":"plain","rater":"r","item":NaN,"answers":{}}', b'{"study":"plain","rater":["\\ud800"],"item":1}', b"{",
     b'{"study":"plain","rater":"\\ud800","item":"x","answers":{}}', b"[]", b'{"study":1}'],
)  # fmt: skip
def test_what_is_not_as_described_is_refused_in_words(client, body):
    answer = client.post("/api/human/votes", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert all(one["msg"] for one in answer.json()["detail"])
