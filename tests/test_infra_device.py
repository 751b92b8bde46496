"""Where programs compute and in what: names of devices, `auto`, the measurement of a CPU, numbers of threads."""

import json
import os
import subprocess
import sys

import pytest
import torch

from infra import device
from infra.device import (
    choose_device,
    choose_num_threads,
    get_cpu_speed,
    locate_cpu_speed,
    resolve_device,
    resolve_precision,
)
from infra.errors import UserError


def test_a_name_is_a_device_of_this_machine_or_one_line():
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("gpu", "cuda:", "cpu:0", "auto:1", "", "cuda:-1"):
        with pytest.raises(UserError, match=f"unknown --device {wrong!r}: expected auto, cpu, cuda or cuda:N"):
            resolve_device(wrong)
    with pytest.raises(UserError, match=r"--device cuda:99 cannot be used here \(.*\); cpu always can"):
        resolve_device("cuda:99")


def test_fp32_is_not_rounded_to_tf32_once_a_device_was_resolved():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    resolve_device("cpu")
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (False, False)


def test_auto_asks_what_the_workers_are_given_and_names_stay():
    assert choose_device("auto", workers=2, gpus_each=0.5) == "cuda"
    assert choose_device("auto", workers=2) == "cpu"
    assert choose_device("cuda:1", workers=2) == "cuda:1"


def test_auto_precision_is_what_was_measured(best_on_cpu):
    for best in ("bf16", "fp32"):
        best_on_cpu(best)
        assert resolve_precision("auto", "cpu") == best
    assert [resolve_precision(asked, "cpu") for asked in ("fp32", "bf16")] == ["fp32", "bf16"]
    with pytest.raises(UserError, match="unknown --device 'cudaa'"):
        resolve_precision("fp32", "cudaa")


def test_gpus_compute_in_bf16_from_compute_capability_8_on(monkeypatch):
    if not torch.cuda.is_available():
        assert resolve_precision("auto", "cuda:1") == "bf16", "a GPU elsewhere is taken for one of today's"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp32"), ((7, 0), "fp32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert resolve_precision("auto", "cuda") == resolve_precision("auto", "auto") == expected


def test_a_cpu_is_measured_once_and_the_answer_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("BEELINE_CACHE", str(tmp_path))
    device._measure_cpu.cache_clear()
    found = get_cpu_speed()
    assert found.fp32 > 0
    assert found.bf16 > 0
    told = json.loads(locate_cpu_speed().read_text())
    assert device.CpuSpeed(told["fp32"], told["bf16"]) == found
    assert (told["torch"], told["threads"]) == (torch.__version__, 1)
    told["bf16"] = 1234.0
    locate_cpu_speed().write_text(json.dumps(told))
    assert get_cpu_speed().bf16 == 1234.0, "what is kept counts"
    locate_cpu_speed().write_text("half a fi")
    assert get_cpu_speed() == found, "a damaged answer is replaced"
    assert json.loads(locate_cpu_speed().read_text())["bf16"] == found.bf16


def test_the_first_of_two_measurements_decides(monkeypatch, tmp_path, best_on_cpu):
    """Ranks of one machine may measure at the same time, and must not end with two answers."""
    best_on_cpu("bf16")
    kept = locate_cpu_speed().read_bytes()
    locate_cpu_speed().unlink()

    def measure_late():
        locate_cpu_speed().write_bytes(kept)
        return device.CpuSpeed(60.0, 0.6)

    monkeypatch.setattr(device, "_measure_cpu", measure_late)
    assert get_cpu_speed().bf16_pays


def test_without_a_writable_cache_the_answer_holds_for_the_process(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BEELINE_CACHE", str(tmp_path / "file"))
    assert get_cpu_speed() == get_cpu_speed()


def test_limits_of_what_torch_may_use_are_another_cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("BEELINE_CACHE", str(tmp_path))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    free = locate_cpu_speed()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert locate_cpu_speed() != free


def test_emulated_bf16_is_found_slow_by_measuring(tmp_path):
    """ONEDNN_MAX_CPU_ISA=AVX2 takes the bf16 units from a CPU that has some; one without any is slow by itself."""
    program = "from infra.device import *; print(get_cpu_speed().bf16_pays, resolve_precision('auto', 'cpu'))"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "BEELINE_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "fp32"], done.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("3", 3),
        ("4,2", 4),
        (" 2 ", 2),
        ("0", 7),
        (" ", 7),
        ("", 7),
        (None, 7),
        ("many", 7),
        ("-1", 7),
        ("2.5", 7),
        (",2", 7),
        ("1000000", 7),
        ("9" * 30, 7),
    ],
)
def test_threads_are_the_first_number_of_omp_num_threads(monkeypatch, caplog, given, expected):
    monkeypatch.delenv("OMP_NUM_THREADS") if given is None else monkeypatch.setenv("OMP_NUM_THREADS", given)
    said = []
    monkeypatch.setattr(device.log, "warning", lambda text, *values: said.append(text % values))
    assert choose_num_threads(7) == expected
    assert bool(said) == (expected == 7 and bool((given or "").strip()))
