"""The JSON API over a real store: what it answers, what it refuses, and that data never becomes markup or a path."""

import json
import os
import re
import time

import jsonschema
import pytest
from eval_runs import write_ladder, write_run
from eval_service_runs import app_on, small_ladder
from openapi import CheckedClient, check

from eval.report.predict import predict
from eval.service.access import choose_access
from eval.service.app import PAGES, WEB
from infra import storage
from infra.errors import UserError
from infra.results import ResultRow, ResultStore

XSS = '<img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("service") / "runs")
    small_ladder(root, checkpoints=2)
    write_run(root, 4, name=XSS.replace("/", ""), scored=False, samples=False)
    return root


@pytest.fixture(scope="module")
def client(root):
    return CheckedClient(app_on(root), base_url="http://127.0.0.1")


def test_every_listed_route_answers_and_is_described(client):
    described = client.get("/openapi.json").json()
    given = {
        "name": "world-d2", "metric": "val_loss/sd3", "family": "world_geneval", "run": "world-d2", "file": "100",
        "study": "s", "rater": "r", "item": 0, "side": "left",
    }  # fmt: skip
    for path, methods in described["paths"].items():
        for method, told in methods.items():
            assert told["summary"], path
            if method == "get" and not path.startswith("/api/human/"):
                parameters = {p["name"]: given[p["name"]] for p in told.get("parameters", []) if p["required"]}
                answer = client.get(path, params=parameters)
                assert answer.status_code == 200, path
                assert answer.headers["content-type"] in told["responses"]["200"]["content"], path
    assert list(described["paths"]["/api/human/picture"]["get"]["responses"]["200"]["content"]) == ["image/webp"]
    assert {"201", "400", "409"} <= set(described["paths"]["/api/human/votes"]["post"]["responses"])
    assert "404" in described["paths"]["/api/run"]["get"]["responses"]
    assert "/api/series" in client.get("/api").text


def test_a_fitted_law_is_as_described(tmp_path):
    root = str(tmp_path)
    write_ladder(root, (2, 3, 4, 6), samples=False)
    predict(root, 8)
    client = CheckedClient(app_on(root), base_url="http://localhost")
    deadline = time.monotonic() + 120
    while (told := client.get("/api/scaling").json())["state"] == "fitting":
        assert told["runs"] == [f"world-d{depth}" for depth in (2, 3, 4, 6)]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert told["scaling"]["reason"] is None
    assert set(told["scaling"]["laws"]) == {"L(N)", "L(N,D)", "L(C)"}
    assert [found["depth"] for found in told["predictions"]] == [8]
    page = client.get("/api").text
    assert 'Answers <a href="#FittedLadder">FittedLadder</a> or <a href="#FittingLadder">FittingLadder</a>' in page
    assert set(re.findall(r'href="#(\w+)"', page)) <= set(re.findall(r'id="(\w+)"', page))


@pytest.mark.parametrize("wrong", [{"images": "12"}, {"images": None}, {"more": 1}, {"name": 3}])
def test_an_answer_that_is_not_as_described_is_found(client, wrong):
    """Of the check that all tests here make."""
    told = client.get("/api/runs").json()
    told["runs"][0] |= wrong
    with pytest.raises(jsonschema.ValidationError):
        check(client.app.openapi(), "get", "/api/runs", 200, told)


def test_pages_are_shells_without_foreign_addresses_or_inline_code(client):
    for path in PAGES:
        answer = client.get(f"/{path}")
        assert answer.status_code == 200
        assert not re.findall(r"(?:src|href)=\"(?:https?:)?//", answer.text)
        assert not re.findall(r"<script(?![^>]*\ssrc=)|\son\w+=|style=", answer.text)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    scripts = ("pages.js", "core.js", "charts.js", "compare.js", "few_steps.js")
    ours = [(WEB / "static" / name).read_text() for name in scripts]
    assert not any(re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text) for text in ours)


def test_series_levels_and_scores_hold_what_the_rows_hold(client):
    series = client.get("/api/series", params={"metric": "val_loss/sd3", "run": ["world-d2", "world-d3"]}).json()
    assert [run["name"] for run in series["runs"]] == ["world-d2", "world-d3"]
    assert series["runs"][0]["images"][-1] == 12_000
    assert len(series["runs"][0]["value"]) == 12
    levels = client.get("/api/levels", params={"run": "world-d2", "images": 12_000}).json()
    assert levels["runs"][0]["t"] == [k / 8 for k in range(1, 9)]
    scores = client.get("/api/scores", params={"family": "world_geneval", "run": "world-d2"}).json()
    assert scores["world"]
    overall = next(line for line in scores["lines"] if (line["task"], line["split"]) == ("overall", "seen"))
    cell = overall["runs"]["world-d2"]
    assert cell["low"] < cell["value"] < cell["high"]
    assert cell["count"] == 96
    nowhere = client.get("/api/scores", params={"family": "world_geneval", "images": 5}).json()
    assert all(line["runs"] == {} for line in nowhere["lines"])


def test_numbers_of_another_protocol_are_named_and_not_shown(tmp_path):
    root = str(tmp_path)
    small_ladder(root, (2, 3))
    write_run(root, 4, protocol="another")
    client = CheckedClient(app_on(root), base_url="http://localhost")
    told = client.get("/api/series", params={"metric": "world_fid"}).json()
    assert "world-d4" in told["left_out"]
    assert "world-d4" not in [run["name"] for run in told["runs"]]


def test_unknown_names_are_told_in_words(client):
    for path, parameters in (
        ("run", {"name": "nope"}), ("scores", {"family": "nope"}), ("prompts", {"run": "nope"}),
        ("picture", {"run": "nope", "file": "100"}), ("picture", {"run": "world-d2", "file": "nope"}),
    ):  # fmt: skip
        answer = client.get(f"/api/{path}", params=parameters)
        assert answer.status_code == 404
        assert "nope" in answer.json()["detail"]
    assert client.get("/api/picture", params={"run": "world-d2", "file": "100", "width": 99999}).status_code == 422


@pytest.mark.parametrize("file", ["../recipe.json", "/etc/passwd", "..%2f..%2fetc%2fpasswd", "recipe.json", "%00"])
def test_only_listed_pictures_can_be_had(client, file):
    assert client.get("/api/picture", params={"run": "world-d2", "file": file}).status_code == 404
    assert client.get(f"/static/../pages/page.html.j2?{file}").status_code == 404


def test_pictures_are_encoded_anew_and_damaged_ones_are_told(tmp_path):
    root = str(tmp_path)
    small_ladder(root, (2,))
    storage.write_bytes(f"{root}/world-d2/gallery/step_0000300.png", b"\x89PNG\r\n\x1a\n<script>")
    client = CheckedClient(app_on(root), base_url="http://localhost")
    good = client.get("/api/picture", params={"run": "world-d2", "file": "100"})
    assert good.content[8:12] == b"WEBP"
    assert good.headers["content-type"] == "image/webp"
    bad = client.get("/api/picture", params={"run": "world-d2", "file": "300"})
    assert bad.status_code == 404
    assert "not a readable picture" in bad.json()["detail"]


def test_markup_in_names_stays_data(client):
    answer = client.get("/api/runs")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    name = XSS.replace("/", "")
    assert name in [run["name"] for run in answer.json()["runs"]]
    assert client.get("/api/run", params={"name": name}).json()["name"] == name
    assert name not in client.get("/run", params={"name": name}).text


def test_a_local_service_answers_local_names_only(client):
    assert client.get("/api/status", headers={"host": "localhost:8080"}).status_code == 200
    assert client.get("/api/status", headers={"host": "[::1]:8080"}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", ""):
        assert client.get("/api/status", headers={"host": host}).status_code == 403


def test_other_addresses_need_a_token(root, tmp_path):
    with pytest.raises(UserError, match="needs --token-file"):
        choose_access("0.0.0.0", None)
    file = tmp_path / "token"
    file.write_text("short\n")
    with pytest.raises(UserError, match="at least 16"):
        choose_access("0.0.0.0", str(file))
    file.write_text("a-token-of-some-length\n")
    app = app_on(root, host="0.0.0.0", token_file=str(file))
    client = CheckedClient(app, base_url="http://eval.example", follow_redirects=False)
    for path in ("/", "/api/runs", "/static/pages.js", "/openapi.json"):
        assert client.get(path).status_code == 401
    assert client.get("/api/runs", headers={"authorization": "Bearer wrong"}).status_code == 401
    assert client.get("/?token=wrong").status_code == 401
    held = {"authorization": "Bearer a-token-of-some-length"}
    assert client.get("/api/runs", headers=held).status_code == 200
    entered = client.get("/losses?run=world-d2&token=a-token-of-some-length")
    assert entered.status_code == 307
    assert entered.headers["location"] == "/losses?run=world-d2"
    assert "httponly" in entered.headers["set-cookie"].lower()
    assert "samesite=strict" in entered.headers["set-cookie"].lower()
    assert client.get("/api/runs").status_code == 200  # by the cookie
    away = client.get("//evil.example/?token=a-token-of-some-length")
    assert away.headers.get("location", "/").startswith("/")
    assert not away.headers.get("location", "/").startswith("//")


def test_what_a_foreign_page_could_send_is_refused(client):
    vote = {"study": "s", "rater": "r", "item": 0, "answers": {}}
    plain = client.post("/api/human/votes", content=json.dumps(vote), headers={"content-type": "text/plain"})
    assert plain.status_code == 403
    foreign = client.post("/api/human/votes", json=vote, headers={"origin": "http://evil.example"})
    assert foreign.status_code == 403
    assert client.post("/api/human/votes", json=vote).status_code == 400  # ours: no such study


def test_half_a_surrogate_pair_is_refused_in_words(client):
    wanted = b'{"name": "ab", "run_a": "\\ud800", "step_a": 1, "run_b": "b", "step_b": 1}'
    answer = client.post("/api/human/studies", content=wanted, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "has no gallery at step 1" in answer.json()["detail"]


def test_failures_come_with_reasons(tmp_path):
    from eval.run import RunOptions
    from eval.service.app import build_app
    from eval.service.claims import claim
    from eval.service.index import Index
    from eval.service.watcher import Watcher
    from eval.service.worker import EvaluationSettings

    root = str(tmp_path)
    uri = write_run(root, 2, scored=False)
    (tmp_path / "world-d2" / "results" / "ab.jsonl").write_text("torn")
    storage.write_bytes(f"{uri}/weights/step_0000010/ema.safetensors", b"x")
    settings = EvaluationSettings(RunOptions(runs=root, metrics=()))
    claim(uri, settings.hash, 10).end("failed", reason=f"{XSS} is not finite")
    index = Index(root)
    index.refresh()
    app = build_app(index, Watcher(index, settings), choose_access("127.0.0.1", None))
    client = CheckedClient(app, base_url="http://[::1]")
    told = client.get("/api/failures").json()
    assert told["evaluations"][0]["reason"] == f"{XSS} is not finite"
    assert told["evaluations"][0]["step"] == 10
    assert "ab.jsonl" in told["unreadable"][0]["reason"]
    assert client.get("/api/runs").json()["runs"][0]["failed"] == 1


def test_a_run_that_has_just_begun_is_no_failure(tmp_path):
    root = str(tmp_path)
    write_run(root, 2, scored=False)
    for file in ("recipe.json", "plan.json"):
        storage.write_bytes(f"{root}/world-d3/{file}", storage.read_bytes(f"{root}/world-d2/{file}"))
    client = CheckedClient(app_on(root), base_url="http://localhost")
    assert {run["name"]: run["problems"] for run in client.get("/api/runs").json()["runs"]}["world-d3"] == 0
    assert client.get("/api/failures").json()["unreadable"] == []
    (tmp_path / "world-d3" / "plan.json").write_text("torn")
    client = CheckedClient(app_on(root), base_url="http://localhost")
    assert "plan.json (unreadable" in client.get("/api/failures").json()["unreadable"][0]["reason"]


def test_odd_file_names_and_prompts_do_no_harm(tmp_path):
    root = str(tmp_path)
    odd = 'run "quoted" \n line\u2028 \udcff %2e%2e'
    os.makedirs(os.fsencode(f"{root}/{odd}/results"))
    uri = storage.join(root, odd)
    ResultStore(uri + "/results").append([ResultRow("x", "h", "v", 8, "val_loss/sd3", 1.0, False, 2, "p")])
    write_run(root, 2, scored=False)
    client = CheckedClient(app_on(root), base_url="http://localhost")
    shown = odd.replace("\udcff", r"\xff")  # what is no text could be in no address
    assert shown in [run["name"] for run in client.get("/api/runs").json()["runs"]]
    assert shown in client.get("/api/series", params={"metric": "val_loss/sd3"}).json()["left_out"]
    assert client.get("/api/run", params={"name": shown}).json()["images"] == 8
    told = client.get("/api/failures").json()["unreadable"]
    assert {"run": shown, "reason": "plan.json is missing"} in told
