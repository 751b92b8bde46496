"""`python -m model`: its JSON, its plots, and its one-line refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from infra.errors import run_cli
from model.__main__ import main
from model.activations import count_activations
from model.backbone import BACKBONES, read_config
from model.diffusion.flow import FORMULATIONS, STUDY
from model.encoders.text import TextCond


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["model", *arguments])
    main()


def test_formulations_lists_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "formulations", "--json")
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(FORMULATIONS)
    assert set(STUDY) <= {row["name"] for row in rows}
    by_name = {row["name"]: row for row in rows}
    assert by_name["edm(-1.20,1.20)"]["network_time"] == "ln(sigma)/4"
    assert by_name["edm/cos"]["sampling_grid"]["start"] == pytest.approx(80)
    assert by_name["eps/linear"]["sampling_grid"]["start"] == pytest.approx(14.61, abs=0.01)
    terminal = {name: row["sampling_grid"]["terminal"] for name, row in by_name.items()}
    assert terminal["rf"] == {"a": 0, "b": 1}
    assert terminal["eps/linear"]["a"] ** 2 == pytest.approx(0.00466, abs=1e-5)
    assert terminal["edm/rf"] == pytest.approx({"a": 1, "b": 80})
    assert by_name["v/cos"]["loss_over_unified_loss"] == pytest.approx(0.6366, abs=1e-4)


def test_info_describes_the_largest_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "info", "d38", "--json", "--no-qk-norm")
    row = json.loads(capsys.readouterr().out)
    assert row["parameters"] == 8_056_617_792
    assert row["train_flops_1024"] == 3 * row["forward_flops_1024"]
    run(monkeypatch, "info", "uvit-d4")
    assert "uvit-d4" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(BACKBONES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_bytes_are_what_autograd_keeps(name: str, dtype: torch.dtype) -> None:
    """Counted on fake tensors, and here on real ones: each storage once, without the parameters."""
    small = {"depth": 2, "in_channels": 4, "context_width": 48, "pooled_width": 24, "pos_max": 16, "pos_tokens": 8}
    config = read_config(name, {**small, "pos_base": 8, **({"clip_tokens": 3} if name == "mmdit3" else {})})
    model = config.build().to(dtype)
    text = TextCond(torch.randn(1, 7, 48, dtype=dtype), torch.randn(1, 24, dtype=dtype))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(torch.randn(1, 4, 16, 16, dtype=dtype), torch.rand(1), text)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    counted = count_activations(config, (4, 16, 16), 7, dtype)
    assert out.requires_grad
    assert counted.whole == pytest.approx(real, rel=0.01)


def test_plots_are_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(monkeypatch, "plot-densities", "--out", str(tmp_path / "figures"))
    for name in ("densities.png", "shift.png", "weights.png"):
        assert (tmp_path / "figures" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("formulatons",), "did you mean 'formulations'"),
        (("info", "d0"), "depth is 0"),
        (("info", "dot-d4"), "did you mean 'dit'"),
        (("info", "big"), "expected d24"),
        (("info", "d2", "--text-tokens", "-5"), "-5 text tokens"),
        (("info", "d99999"), "at most 256"),
        (("info", "d2", "--jsn"), "unknown option --jsn (did you mean --json?); python -m model"),
        (("info",), "python -m model info needs MODEL"),
        (("info", "d2", "--text-tokens", "x"), "--text-tokens: expected {None}|INT"),
        (("info", "d2", "--text-tokens"), "--text-tokens needs {None}|INT"),
        (("convert", "a", "b", "--to", "sd4"), "did you mean 'sd3'"),
        (("convert", "/nowhere", "x"), "nothing at /nowhere"),
        (("plot-densities", "--out", "/proc/nowhere"), "/proc/nowhere"),
    ],
)
def test_mistakes_end_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["model", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_cli(main)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in error
    assert error.count("\n") == 1
