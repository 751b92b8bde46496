"""Plans as files: they say what the command line says, refuse what it refuses, and every run leaves its own."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from data_pipeline.__main__ import main
from data_pipeline.commands import gather_sources
from data_pipeline.flow.plan_file import read_plan_file
from data_pipeline.loading.loader import open_dataset
from data_pipeline.plans import PLANS, build_columns, sd3, world
from infra.errors import UserError, run_cli


def call(monkeypatch, capsys, *args: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["data_pipeline", *map(str, args)])
    with pytest.raises(SystemExit) as done:
        run_cli(main)
    captured = capsys.readouterr()
    return int(done.value.code or 0), captured.out + captured.err


def test_a_file_is_the_command_line_written_down(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(
        "plan: world\nout: /data\nkeep_going: true\nfetch-urls: false\ngate: {min-side: 8}\n"
        "captioner:\n  max_new_tokens: 4\n  trust_remote_code: false\n  pip: [a==1, b==2]\n"
    )
    assert read_plan_file(str(file)) == (
        "world",
        ["--out", "/data", "--keep-going", "--no-fetch-urls", "--gate.min-side", "8"]
        + ["--captioner.max-new-tokens", "4", "--captioner.no-trust-remote-code", "--captioner.pip", "a==1", "b==2"],
    )
    (tmp_path / "plan.json").write_text('{"plan": "world", "out": "/data"}')
    assert read_plan_file(str(tmp_path / "plan.json")) == ("world", ["--out", "/data"])


@pytest.mark.parametrize(
    "words",
    [
        ["--source", "wds:/a", "--out", "x", "--source", "hf:/b"],
        ["--source", "wds:/a", "hf:/b", "--out", "x"],
        ["--out", "x", "--source=wds:/a", "--source=hf:/b"],
    ],
)
def test_several_sources_are_named_one_by_one_or_together(words):
    assert gather_sources(words) == ["--out", "x", "--source", "wds:/a", "hf:/b"]
    assert gather_sources(["--out", "x"]) == ["--out", "x"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("out: [", "not YAML in line"),
        ("- a\n- b\n", "plan: world"),
        ("out: x\n", "plan: world"),
    ],
)
def test_files_that_are_no_plan_are_one_line(tmp_path, text, message):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_plan_file(str(tmp_path / "plan.yaml"))


def test_a_run_from_a_file_and_again_from_the_file_it_leaves(tmp_path, monkeypatch, capsys):
    out = tmp_path / "data"
    asked = {"plan": "world", "out": str(out), "images": 12, "val_images": 4, "workers": 0, "pack_rows": 8}
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(asked | {"captioner": {"max_new_tokens": 20}, "seed": 3}))
    code, said = call(monkeypatch, capsys, "run", file, "--seed", "4")
    assert code == 0, said
    left = yaml.safe_load((out / "plan.yaml").read_text())
    assert left == asked | {"captioner": {"max_new_tokens": 20}, "seed": 4}
    assert open_dataset(str(out)).num_samples == 12
    code, said = call(monkeypatch, capsys, "run", out / "plan.yaml")
    assert (code, "nothing was missing" in said) == (0, True), said
    code, said = call(monkeypatch, capsys, "report", out)
    assert (code, "min_side" in said) == (0, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plan: wrld\nout: x\n", "did you mean 'world'"),
        ("plan: world\nout: x\nsorce: folder:y\n", "--source"),
        ("plan: world\nout: x\nresolution: big\n", "resolution"),
    ],
)
def test_a_file_is_checked_like_the_command_line(tmp_path, monkeypatch, capsys, text, message):
    (tmp_path / "plan.yaml").write_text(text)
    code, said = call(monkeypatch, capsys, "run", tmp_path / "plan.yaml")
    assert code == 2
    assert message in said
    assert "Traceback" not in said


def test_text_options_change_the_spec_and_with_it_the_columns(tmp_path):
    plan = world()
    assert plan.settle() == plan
    short = replace(plan, text_tokens=8, text_layout="padded").settle()
    assert [encoder.tokens for encoder in short.text_spec.encoders] == [16, 8]
    one, other = (build_columns(p, "").fingerprints for p in (plan, short))
    assert {name for name in one if one[name] != other[name]} == {"text_clip_l", "text_t5"}
    with pytest.raises(UserError, match=r"--clip-g: plan world has no such text encoder, it has clip_l, t5"):
        replace(plan, clip_g="x").settle()


def test_the_plan_of_sd3_names_what_is_missing():
    assert set(PLANS) == {"world", "sd3"}
    plan = replace(sd3(), t5=str(Path(__file__).parent)).settle()
    assert plan.text_spec.t5 is not None
    assert plan.text_spec.t5.checkpoint == str(Path(__file__).parent)
    assert plan.strict.max_nsfw == 0.3
    with pytest.raises(UserError) as refused:
        build_columns(plan, "")
    for missing in ("cogvlm-chat-hf", "sscd_disc_mixup.torchscript.pt"):
        assert f"'checkpoints/{missing}'" in str(refused.value)
    assert str(Path(__file__).parent) not in str(refused.value)
