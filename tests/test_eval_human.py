"""Side by side: blind and balanced, one answer per rater and pair, win rates whose intervals hold what they claim."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from eval_service_runs import app_on, small_ladder, write_gallery
from openapi import CheckedClient

from eval.studies.human import (
    HumanStudies,
    StudySide,
    Vote,
    compute_win_rate,
    estimate_effective_size,
    wilson,
)
from infra import storage
from infra.errors import UserError

PROMPTS = [f"prompt {i}" for i in range(12)] + ['a sign that says "bees"']


@pytest.fixture
def studies(tmp_path):
    return HumanStudies(str(tmp_path / "runs"))


@pytest.fixture
def study(studies):
    return studies.create("one", StudySide("world-d2", 100), StudySide("world-d3", 100), prompts=PROMPTS, gallery="g")


def test_left_and_right_are_balanced_and_each_rater_has_an_order_of_their_own(study):
    sides = [study.choose_left(f"rater {r}", item) for r in range(200) for item in range(13)]
    assert 0.46 < sides.count("a") / len(sides) < 0.54
    assert study.choose_left("ann", 3) == study.choose_left("ann", 3)
    assert study.order("ann") != study.order("bob")
    assert sorted(study.order("ann")) == list(range(13))


def test_typography_is_asked_where_words_are_quoted(studies, study):
    assert study.list_questions(12) == ("prompt_following", "aesthetics", "typography")
    assert "typography" not in study.list_questions(0)
    apostrophes = ["a dog's bone", "the cats' house"]
    plain = studies.create("plain", StudySide("a", 1), StudySide("b", 1), prompts=apostrophes, gallery="g")
    assert all("typography" not in plain.list_questions(item) for item in range(2))
    with pytest.raises(UserError, match="nothing to ask"):
        studies.create(
            "none",
            StudySide("a", 1),
            StudySide("b", 1),
            prompts=["a dog"],
            gallery="g",
            questions=["typography"],
        )


def test_an_answer_is_kept_once_and_says_which_side_it_meant(studies, study):
    answers = {"prompt_following": "left", "aesthetics": "same"}
    assert studies.vote(study, "ann", 3, answers)
    for again in (" ann ", "Ann"):  # as a phone's keyboard writes it
        assert not studies.vote(study, again, 3, {"prompt_following": "right", "aesthetics": "right"})
        assert studies.find_next(study, again)[1] == 1
    (vote,) = studies.read_votes(study)
    assert vote.answers == {"prompt_following": study.choose_left("ann", 3), "aesthetics": "same"}
    item, done, total = studies.find_next(study, "ann")
    assert item != 3
    assert (done, total) == (1, 13)
    for item in range(13):
        studies.vote(study, "ann", item, dict.fromkeys(study.list_questions(item), "left"))
    assert studies.find_next(study, "ann") == (None, 13, 13)
    assert len(studies.read_votes(study)) == 13
    assert HumanStudies(studies.root.removesuffix("/human")).read_votes(study) == studies.read_votes(
        study
    )  # all is in the store


def test_of_many_tabs_one_answer_is_kept(studies, study):
    with ThreadPoolExecutor(8) as pool:
        kept = list(
            pool.map(lambda _: studies.vote(study, "ann", 0, dict.fromkeys(study.list_questions(0), "left")), range(16))
        )
    assert kept.count(True) == 1
    assert len(studies.read_votes(study)) == 1


def test_bad_answers_raters_and_names_are_refused(studies, study):
    good = {"prompt_following": "left", "aesthetics": "same"}
    for answers in ({}, {"prompt_following": "left"}, {**good, "typography": "left"}, {**good, "aesthetics": "both"}):
        with pytest.raises(UserError, match="expected left, right or same"):
            studies.vote(study, "ann", 0, answers)
    for rater in ("", "  ", "x" * 61, "a\x00b"):
        with pytest.raises(UserError, match="printable"):
            studies.vote(study, rater, 0, good)
    with pytest.raises(UserError, match="no pair 99"):
        studies.vote(study, "ann", 99, good)
    for name in ("", "../up", "UPPER", "a/b", "x" * 41):
        with pytest.raises(UserError, match="small letters"):
            studies.create(name, StudySide("a", 1), StudySide("b", 1), prompts=PROMPTS, gallery="g")
    with pytest.raises(UserError, match="there already"):
        studies.create("one", StudySide("a", 1), StudySide("b", 1), prompts=PROMPTS, gallery="g")
    with pytest.raises(UserError, match="same checkpoint"):
        studies.create("two", StudySide("a", 1), StudySide("a", 1), prompts=PROMPTS, gallery="g")
    with pytest.raises(UserError, match="did you mean 'one'"):
        studies.get("onee")


def test_torn_and_foreign_votes_are_skipped(studies, study):
    studies.vote(study, "ann", 0, dict.fromkeys(study.list_questions(0), "left"))
    votes = storage.join(studies.root, "study-one", "votes")
    storage.write_bytes(f"{votes}/torn.json", b'{"rater": "b')
    forged = {"rater": "ann", "item": 0, "answers": {"aesthetics": "a"}, "created": ""}
    storage.write_bytes(f"{votes}/{'0' * 32}.json", json.dumps(forged).encode())  # a second vote under another name
    assert len(studies.read_votes(study)) == 1


def test_win_rate_counts_ties_half_and_agreement_is_not_certainty():
    votes = [Vote("ann", item, {"aesthetics": side}) for item, side in enumerate(["a", "a", "b", "same"])]
    rate = compute_win_rate("aesthetics", votes)
    assert (rate.wins_a, rate.wins_b, rate.ties, rate.value) == (2, 1, 1, 0.625)
    assert rate.low < 0.625 < rate.high
    agreed = [Vote(f"r{rater}", item, {"aesthetics": "a"}) for item in range(5) for rater in range(20)]
    unanimous = compute_win_rate("aesthetics", agreed)
    assert unanimous.value == 1
    assert unanimous.low == pytest.approx(wilson(1, 5)[0])  # five prompts, not a hundred answers
    assert unanimous.low < 0.6
    assert compute_win_rate("typography", votes).value is None
    np.testing.assert_allclose(wilson(0.5, 100), (0.4038, 0.5962), atol=1e-4)  # published table values


def test_repeated_answers_to_a_prompt_widen_the_interval_to_the_prompts():
    # Kish's size is 3; four prompts measure their spread with 3 degrees of freedom, whose t is 3.182.
    divided = estimate_effective_size([[1.0] * 10, [0.0] * 10, [1.0] * 10, [0.0] * 10], 0.5)
    assert divided == pytest.approx(3 * (1.959964 / 3.182446) ** 2)
    alternating = [[1.0, 0.0] * 5 for _ in range(4)]
    assert estimate_effective_size(alternating, 0.5) == 4  # no spread between prompts: still no more than what they are


@pytest.mark.parametrize(("prompts", "raters"), [(40, 1), (40, 4), (8, 20)])
def test_the_interval_holds_the_true_rate_as_often_as_it_says(prompts, raters):
    """Prompts differ in how often a wins there; ties included. 1,500 studies; the service's gallery has 8 prompts."""
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(1500):
        p = rng.beta(3, 2, prompts)
        y = np.where(rng.random((prompts, raters)) < 0.2, 0.5, rng.random((prompts, raters)) < p[:, None])
        rate = float(y.mean())
        low, high = wilson(rate, estimate_effective_size(y.tolist(), rate))
        held += low <= 0.1 + 0.8 * 0.6 <= high
    assert 0.935 <= held / 1500 <= 0.985


def test_the_whole_way_through_the_api_is_blind(tmp_path):
    root = str(tmp_path)
    small_ladder(root)
    client = CheckedClient(app_on(root), base_url="http://localhost")
    wanted = {"name": "ab", "run_a": "world-d2", "step_a": 200, "run_b": "world-d3", "step_b": 200}
    assert client.post("/api/human/studies", json=wanted).status_code == 201
    assert client.post("/api/human/studies", json=wanted).status_code == 400
    secrets = [storage.read_bytes(f"{root}/human/study-ab/study.json").decode(), "world-d"]
    secret = json.loads(secrets[0])["secret"]
    seen = set()
    for _ in range(4):
        pair = client.get("/api/human/next", params={"study": "ab", "rater": "ann"})
        assert "world" not in pair.text
        told = pair.json()
        shades = {}
        for side in ("left", "right"):
            parameters = {"study": "ab", "rater": "ann", "item": told["item"], "side": side}
            picture = client.get("/api/human/picture", params=parameters)
            assert picture.headers["cache-control"] == "no-store"
            assert "world" not in str(picture.headers)
            shades[side] = shade(picture.content)
        assert sorted(shades.values()) == [40, 60]
        seen.add((told["item"], told["prompt"]))
        answers = dict.fromkeys(told["questions"], "left" if shades["left"] == 40 else "right")  # always depth 2
        vote = {"study": "ab", "rater": "ann", "item": told["item"], "answers": answers}
        assert client.post("/api/human/votes", json=vote).status_code == 201
        assert client.post("/api/human/votes", json=vote).status_code == 409
    assert len(seen) == 4
    assert client.get("/api/human/next", params={"study": "ab", "rater": "ann"}).json()["item"] is None
    listed = client.get("/api/human/studies").text
    assert secret not in listed
    results = client.get("/api/human/results", params={"study": "ab"}).json()
    by_question = {rate["question"]: rate for rate in results["rates"]}
    assert by_question["prompt_following"]["wins_a"] == 4
    assert by_question["typography"]["prompts"] == 2  # two of them quote words
    assert secret not in json.dumps(results)


def test_a_torn_study_hides_no_other(tmp_path):
    root = str(tmp_path)
    small_ladder(root)
    client = CheckedClient(app_on(root), base_url="http://localhost")
    wanted = {"name": "ab", "run_a": "world-d2", "step_a": 200, "run_b": "world-d3", "step_b": 200}
    assert client.post("/api/human/studies", json=wanted).status_code == 201
    for name, content in (("torn", b'{"a": {"run"'), ("foreign", b"[]"), ("No Name", b"{}")):
        storage.write_bytes(f"{root}/human/study-{name}/study.json", content)
    told = client.get("/api/human/studies").json()
    assert [study["name"] for study in told["studies"]] == ["ab"]
    assert len(told["unreadable"]) == 3
    assert client.get("/api/human/results", params={"study": "torn"}).status_code == 400


def test_galleries_that_differ_are_not_compared(tmp_path):
    root = str(tmp_path)
    small_ladder(root)
    write_gallery(f"{root}/world-d3", 200, shade=9, sampling={"steps": 8})
    client = CheckedClient(app_on(root), base_url="http://localhost")
    wanted = {"name": "ab", "run_a": "world-d2", "step_a": 200, "run_b": "world-d3", "step_b": 200}
    refused = client.post("/api/human/studies", json=wanted)
    assert refused.status_code == 400
    assert "not comparable" in refused.json()["detail"]
    wanted |= {"step_a": 100, "step_b": 100}
    assert client.post("/api/human/studies", json=wanted).status_code == 201
    write_gallery(f"{root}/world-d3", 100, shade=9, sampling={"steps": 8})  # drawn again otherwise meanwhile
    pictures = [
        client.get("/api/human/picture", params={"study": "ab", "rater": "ann", "item": 0, "side": side})
        for side in ("left", "right")
    ]
    # Neither is shown, and in the same words: which one is at fault would tell whose the other is.
    assert [picture.status_code for picture in pictures] == [400, 400]
    assert pictures[0].text == pictures[1].text
    assert "world-d" not in pictures[0].text
    assert client.post("/api/human/studies", json={**wanted, "name": "x", "step_b": 7}).status_code == 400


def shade(webp):
    import io

    from PIL import Image

    return Image.open(io.BytesIO(webp)).convert("RGB").getpixel((30, 30))[0]
