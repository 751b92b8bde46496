"""GenEval's files: layout, stored detections, summary, and sets that are not complete."""

import json

import numpy as np
import pytest
from geneval_folders import write_folder

from eval.judging.geneval_prompts import draw_official_metadata, parse_metadata, read_metadata
from eval.metrics.geneval.files import (
    check_complete,
    judge_stored,
    read_folders,
    summarize,
    write_results,
)
from eval.metrics.geneval.tool import judge
from eval.studies.sample import expand
from infra.errors import UserError

RED_DOG = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a photo of a red dog"}
CAT = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"}
GRAY = np.full((8, 8, 3), 128, dtype=np.uint8)


def test_folders_come_back_as_written_and_strangers_are_ignored(tmp_path):
    write_folder(tmp_path, 0, RED_DOG, [GRAY, GRAY])
    write_folder(tmp_path, 12, CAT, [GRAY])
    (tmp_path / "notes").mkdir()
    for stranger in ("grid.jpg", "0000.png.bak", "a0000.png"):
        (tmp_path / "00000" / "samples" / stranger).write_bytes(b"not an image")
    found = read_folders(tmp_path)
    assert [(str(f.path.relative_to(tmp_path)), f.metadata) for f in found] == [
        ("00000/samples/0000.png", RED_DOG),
        ("00000/samples/0001.png", RED_DOG),
        ("00012/samples/0000.png", CAT),
    ]


def test_a_broken_folder_is_named(tmp_path):
    write_folder(tmp_path, 3, CAT, [GRAY])
    (tmp_path / "00003" / "metadata.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"00003/metadata\.jsonl"):
        read_folders(tmp_path)
    with pytest.raises(UserError, match="no image folder"):
        read_folders(tmp_path / "missing")


def test_incomplete_sets_are_refused_with_the_number_missing():
    expected = draw_official_metadata()
    found = [record for record in expected for _ in range(4)][:-9]
    with pytest.raises(UserError, match=r"9 of 2212 images are missing \(3 of 553 prompts"):
        check_complete(found, expected, 4, allow_partial=False)
    assert check_complete(found, expected, 4, allow_partial=True) == 9
    assert check_complete(found * 2, expected[:500], 4, allow_partial=True) == 0
    with pytest.raises(UserError, match="not of this set"):
        check_complete([CAT | {"prompt": "x"}], [CAT], 1, allow_partial=False)


def stored(tmp_path, *records):
    path = tmp_path / "detections.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_stored_detections_are_judged_and_judged_again_from_their_results(tmp_path):
    boxes = {"dog": [[0, 0, 5, 5, 0.4], [0, 0, 8, 8, 0.8]], "cat": [[1, 1, 2, 2, 0.2]]}
    record = {"filename": "a.png", "metadata": RED_DOG, "detections": boxes, "colors": {"dog": ["blue", "red"]}}
    rows = list(judge_stored(stored(tmp_path, record, record | {"metadata": CAT})))
    assert [(r["correct"], r["reason"]) for r in rows] == [(True, ""), (False, "expected cat>=1, found 0")]
    assert list(rows[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert json.loads(rows[0]["metadata"]) == RED_DOG
    assert json.loads(rows[1]["details"]) == {
        "dog": [[0, 0, 8, 8, pytest.approx(0.8)], [0, 0, 5, 5, pytest.approx(0.4)]]
    }
    write_results(tmp_path / "results.jsonl", rows[1:])
    again = list(judge_stored(tmp_path / "results.jsonl"))
    assert again == rows[1:]


def test_stored_detections_say_what_is_wrong_with_a_line(tmp_path):
    base = {"filename": "a.png", "metadata": RED_DOG, "detections": {"dog": [[0, 0, 5, 5, 0.4]]}}
    for record, words in [
        (base, "stores no colors"),
        (base | {"colors": {"dog": ["red", "red"]}}, "2 colors for 1 boxes"),
        (base | {"detections": {"dog": [[0, 0, 5, float("nan"), 0.4]]}}, "not a finite number"),
        (base | {"detections": {"dog": [[0, 0, 5]]}}, "not a stored detection"),
        ({"filename": "a.png"}, "not a stored detection"),
    ]:
        with pytest.raises(UserError, match=words):
            list(judge_stored(stored(tmp_path, record)))


def test_summary_is_the_unweighted_mean_of_tasks():
    def row(tag, correct, prompt):
        return {"tag": tag, "correct": correct, "metadata": prompt}

    rows = [row("colors", True, "p"), row("colors", False, "p"), row("colors", False, "q"), row("position", True, "r")]
    summary = summarize(rows)
    assert summary.tasks == {"colors": (1 / 3, 1, 3), "position": (1.0, 1, 1)}
    assert summary.overall == pytest.approx(2 / 3)
    assert (summary.correct_images, summary.correct_prompts) == (0.5, pytest.approx(2 / 3))
    assert "colors           = 33.33% (1 / 3)" in summary.text()
    assert summary.text().endswith("Overall score (avg. over tasks): 0.66667")
    with pytest.raises(UserError):
        summarize([])


def test_metadata_files_are_checked(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(CAT) + "\n\n" + json.dumps(RED_DOG) + "\n")
    assert read_metadata(path) == [CAT, RED_DOG]
    broken = CAT | {"prompt": "a cat\u2028on two\x85lines"}
    path.write_text(json.dumps(broken, ensure_ascii=False) + "\r\n" + json.dumps(CAT), encoding="utf-8")
    assert read_metadata(path) == [broken, CAT]
    assert [wanted.metadata for wanted in expand([str(path)])] == [broken, CAT]
    path.write_text(json.dumps(CAT) + "\n\n" + json.dumps(RED_DOG) + "\n")
    with pytest.raises(UserError, match=r"m.jsonl:3: unknown class 'dog'"):
        read_metadata(path, classes=["cat"])
    forward = {"class": "dog", "count": 1, "position": ["above", 0]}
    with pytest.raises(UserError, match=r"position of 'dog' is \['above', 0\]: .* an earlier include clause"):
        parse_metadata({"tag": "position", "prompt": "", "include": [forward]}, "here")


ONE = {"class": "cat", "count": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"include": 5},
        {"exclude": {"class": "cat"}},
        {"include": [{"class": ["cat"], "count": 1}]},
        {"include": [{"class": "cat", "count": True}]},
        {"include": [{"class": "cat", "count": "1"}]},
        {"include": [{"class": "cat", "count": 1, "color": ["red"]}]},
        {"include": [{"class": "cat", "count": 1, "color": 3}]},
        *({"include": [ONE, {**ONE, "position": position}]} for position in (
            "left", ["left of"], ["left of", "0"], ["left of", 0.0], ["left of", 1], ["left of", -1], ["beside", 0],
            ["left of", 0, 0], [["left of"], 0], None)),
        {"include": [ONE], "exclude": [{**ONE, "position": ["left of", 0]}]},
    ],
)  # fmt: skip
def test_clauses_that_cannot_be_judged_are_refused(changes):
    with pytest.raises(UserError, match=r"^here: "):
        parse_metadata(json.dumps(CAT | changes), "here")


def test_images_that_stand_twice_in_a_file_are_not_counted_twice(tmp_path, capsys):
    line = {"filename": "0000.png", "metadata": CAT, "detections": {"cat": [[0, 0, 4, 4, 0.9]]}}
    other = line | {"metadata": CAT | {"prompt": "a photo of a tom"}}  # the same name in another prompt's folder
    judge(stored(tmp_path, line, other), allow_partial=True)
    assert "Total images: 2" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"1 images stand there more than once, e\.g\. '0000\.png'"):
        judge(stored(tmp_path, line, other, line), allow_partial=True)


def test_words_that_nobody_detects_are_refused_unless_the_own_prompts_have_them(tmp_path, capsys):
    dgo = {"tag": "single_object", "include": [{"class": "dgo", "count": 1}], "prompt": "a photo of a dgo"}
    line = {"filename": "0000.png", "metadata": dgo, "detections": {"dog": [[0, 0, 4, 4, 0.9]]}}
    with pytest.raises(UserError, match=r"0000\.png asks for 'dgo', .* to the prompts of GenEval \(did you mean 'dog'"):
        judge(stored(tmp_path, line), allow_partial=True)
    pale = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "bleu"}], "prompt": "a bleu dog"}
    with pytest.raises(UserError, match=r"asks for the color 'bleu' \(did you mean 'blue'\?\)"):
        judge(stored(tmp_path, line | {"metadata": pale, "colors": {"dog": ["blue"]}}), allow_partial=True)
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps(dgo) + "\n" + json.dumps(pale) + "\n")
    blue = line | {"metadata": pale, "colors": {"dog": ["bleu"]}}
    judge(stored(tmp_path, line, blue), metadata=own, images_per_prompt=1)
    printed = capsys.readouterr()
    assert "Total images: 2" in printed.out
    assert printed.err == ""


def test_a_set_is_not_complete_because_no_images_are_asked_for(tmp_path):
    line = {"filename": "0000.png", "metadata": CAT, "detections": {}}
    for number in (0, -1):
        with pytest.raises(UserError, match="--images-per-prompt must be 1 or more"):
            judge(stored(tmp_path, line), images_per_prompt=number)


def test_images_outside_the_set_are_counted_and_said(tmp_path, capsys):
    dog = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}
    lines = [
        {"filename": f"{i}.png", "metadata": metadata, "detections": {}}
        for i, metadata in enumerate([dog, CAT | {"prompt": "a tom"}, CAT | {"prompt": "a puss"}])
    ]
    judge(stored(tmp_path, *lines), allow_partial=True)
    assert capsys.readouterr().err.splitlines() == [
        "partial set: 2211 of 2212 images are missing",
        "outside the set: 2 of 3 images are of other prompts, e.g. 'a tom', and are scored with the rest; "
        "--metadata FILE names another set",
    ]


@pytest.mark.parametrize("prompt", ['a sign that says "no/yes"', "two\nlines", "it's 100 % <b>bold", "../../etc"])
def test_any_prompt_travels_in_geneval_folders_and_unfit_ones_are_refused_as_file_names(tmp_path, prompt):
    from eval.metrics.compbench.files import name_sample, parse_name

    record = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": prompt}
    write_folder(tmp_path, 0, record, [GRAY])
    assert [f.metadata["prompt"] for f in read_folders(tmp_path)] == [prompt]
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["0000.png", "metadata.jsonl"]
    if "/" in prompt or "\n" in prompt:
        with pytest.raises(UserError, match=r"which .* cannot be"):
            name_sample(prompt, 0)
    else:
        assert parse_name(name_sample(prompt, 7)) == (prompt, 7)
