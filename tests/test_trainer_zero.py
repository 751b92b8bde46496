"""DeepSpeed on two real ranks: what is sharded, the EMA trap, restoring, export, validation, every ZeRO stage."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from trainer_launch import run_ranks
from trainer_zero_checks import CONFIG, RECIPE

from data_pipeline.loading.loader import open_dataset
from data_pipeline.packing.synthetic import write_synthetic
from infra.errors import UserError
from model.files.weights import load_model, load_weights
from trainer.checks.values import check_values
from trainer.exports.export import Weights, write
from trainer.validate import Validator
from trainer.zero.engine import make_deepspeed_config
from trainer.zero.group import Group

pytestmark = pytest.mark.dist
ALONE = Group(0, 1, torch.device("cpu"))
PARAMETERS = CONFIG.count_parameters()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("zero")
    shape = (4, 8, 8)
    write_synthetic(str(path / "data"), num_samples=64, val_samples=40, latent_shape=shape, buckets=("32x32",))
    run_ranks([str(Path(__file__).parent / "trainer_zero_checks.py"), str(path / "data"), str(path)], 2)
    return path


@pytest.fixture(scope="module")
def found(folder) -> dict:
    return json.loads((folder / "found.json").read_text())


def test_each_rank_holds_half(found):
    assert found["sizes"]["parameters"] == PARAMETERS
    assert found["sizes"]["local"] == pytest.approx(PARAMETERS / 2, rel=1e-3)
    assert found["live_before"] == 0  # nothing but shards lives between steps


def test_sharded_ema_equals_the_unsharded_formula(found):
    assert found["ema_error"] < 1e-6


def test_zero_ema_computes_like_the_zero_model_and_restores_bit_exactly(found):
    assert found["normal_output"] > 1e-3
    assert found["zero_output"] == 0.0
    assert found["restored"]
    assert found["trap"], "DeepSpeed no longer caches gathered parameters: the trap's test has lost its meaning"


def test_loss_falls(found):
    assert found["losses"][-1] < found["losses"][0]


def test_export_equals_gathered_weights(folder, found):
    assert found["exported"]
    raw, meta = load_weights(folder / "raw.safetensors")
    gathered = torch.load(folder / "gathered.pt", weights_only=True)
    assert raw.keys() == gathered.keys()
    assert all(torch.equal(raw[name], gathered[name]) for name in raw)
    assert (meta["kind"], meta["images_seen"], meta["recipe_hash"]) == ("raw", 32, RECIPE.hash)
    ema, meta = load_weights(folder / "ema.safetensors")
    assert meta["ema_profile"] == "power:0.20"
    assert not all(torch.equal(raw[name], ema[name]) for name in raw)


def test_failed_export_is_told_to_every_rank(found):
    assert found["refused"]


def test_empty_tensors_of_a_sharded_module_are_refused(folder, found):
    count = len(CONFIG.build().state_dict())
    assert f"{count} misshapen" in found["empty"]
    assert "(0,) instead of" in found["empty"]
    assert not list(folder.glob("empty_*"))


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda x: x.new_empty(0), "(0,)"),
        (lambda x: x.T, "(128, 16)"),
        (lambda x: x * float("nan"), "(16, 128)"),
    ],
)
def test_an_exporter_that_is_given_a_wrong_tensor_leaves_no_file(tmp_path, spoil, found):
    state = CONFIG.build().state_dict()
    shapes = {name: tuple(x.shape) for name, x in state.items()}
    last = "final.linear.weight"
    meta = {"kind": "raw", "backbone": "mmdit", "config": CONFIG.to_json()}

    def read(name: str) -> torch.Tensor:
        return spoil(state[name]) if name == last else state[name]

    with pytest.raises(UserError, match=re.escape(f"{last} is {found} or not finite, expected finite (16, 128)")):
        write([str(tmp_path / "w.safetensors")], Weights(shapes, read, meta))
    with pytest.raises(UserError, match="1 tensors do not fit the model"):
        write([str(tmp_path / "w.safetensors")], Weights({n: shapes[n] for n in shapes if n != last}, read, meta))
    assert list(tmp_path.iterdir()) == []


class Plain:
    """One process with the exported weights, in the seat of the engine."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __call__(self, *inputs):
        return self.model(*inputs).float()

    @contextlib.contextmanager
    def inference(self):
        with torch.no_grad():
            yield


def test_validation_does_not_depend_on_the_number_of_ranks(folder, found):
    """Three batches on two ranks (one rank repeats a batch) against one plain process with the exported EMA.

    Not bit-equal: MKL's last bit depends on where in memory the weights lie, and ZeRO gathers them into flat buffers.
    """
    validator = Validator(RECIPE, open_dataset(str(folder / "data"), split="val"))
    alone = validator.run(Plain(load_model(folder / "ema.safetensors")[0]), ALONE)
    assert [alone.mean, *alone.per_level.values()] == pytest.approx(found["validation"], rel=1e-7)
    assert alone.sample_count == found["validation_count"] == 40
    assert list(alone.per_level) == [k / 8 for k in range(1, 9)]


def test_the_loss_with_zero_ema_is_that_of_the_zero_model(folder, found):
    zero = CONFIG.build()
    with torch.no_grad():
        for param in zero.parameters():
            param.zero_()
    plain = Validator(RECIPE, open_dataset(str(folder / "data"), split="val")).run(Plain(zero), ALONE)
    assert [plain.mean, *plain.per_level.values()] == found["zero_validation"]
    assert found["zero_validation"][0] != pytest.approx(found["validation"][0], rel=1e-3)


@pytest.mark.parametrize("protocol", ["mlperf", "midpoint"])
def test_every_protocol_gives_two_ranks_the_figures_of_one(folder, found, protocol):
    recipe = dataclasses.replace(RECIPE, validation=dataclasses.replace(RECIPE.validation, protocol=protocol))
    validator = Validator(recipe, open_dataset(str(folder / "data"), split="val"))
    alone = validator.run(Plain(load_model(folder / "ema.safetensors")[0]), ALONE)
    assert [alone.mean, *alone.per_level.values()] == pytest.approx(found["protocols"][protocol], rel=1e-7)


def test_non_finite_gradient_is_seen_and_never_stepped(found):
    assert found["skip_seen"]
    assert found["bf16_skip_seen"]
    assert found["bf16_skip_kept"]
    assert len(found["bf16_skips"]) == 4
    assert not any(found["bf16_skips"].values()), found["bf16_skips"]
    assert found["skip_kept"]


@pytest.mark.parametrize("name", ["stage0", "stage1", "stage2", "accumulate", "checkpoint", "persistent"])
def test_every_way_to_spread_the_work_gives_the_same_run(found, name):
    other = found["stages"][name]
    assert other["losses"] == pytest.approx(found["losses"], rel=1e-5)
    assert other["validation"] == pytest.approx(found["validation"][0], rel=1e-4)
    assert other["zero_output"] == 0.0
    assert other["restored"]
    assert other["teacher"], "the weights of the start, as they were kept"
    # Shares, 4 bytes a number, and under stages 1 to 3 DeepSpeed's padding.
    assert 0 <= other["teacher_bytes"] - 4 * other["local"] < 4096
    assert other["adam_steps"] == 4
    share = PARAMETERS if name == "stage0" else PARAMETERS / 2
    assert other["local"] == pytest.approx(share, rel=0.2 if name in ("stage1", "stage2") else 1e-3)


@pytest.mark.parametrize("name", ["stage0", "stage1", "stage2", "checkpoint", "persistent"])
def test_discarded_gradients_leave_no_trace(found, name):
    seen = found["stages"][name]["discards"]
    assert seen.keys() >= {"seen", "same", "clean", "counted"}
    assert ("spoiled_by_one" in seen) == (name != "stage0")
    assert all(seen.values()), seen


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hpz": 8, "quantized_weights": True, "quantized_gradients": True}, {"zero_hpz_partition_size": 8}),
        ({"offload_optimizer": True}, {"offload_optimizer": "cpu"}),
        (
            {"offload_optimizer": True, "offload_parameters": "nvme", "nvme_path": "/nvme"},
            {"offload_param": "nvme", "offload_optimizer": "cpu"},
        ),
    ],
)
def test_deepspeed_takes_the_switches_of_many_nodes(changes, says):
    """As far as a machine without a GPU can tell: DeepSpeed's own validation of what we hand it."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    recipe = dataclasses.replace(RECIPE, parallel=dataclasses.replace(RECIPE.parallel, **changes))
    check_values(recipe)
    config = make_deepspeed_config(recipe, Group(0, 1, torch.device("cpu")), accumulation=1)["zero_optimization"]
    taken = DeepSpeedZeroConfig(**config)
    for name, value in says.items():
        found = getattr(taken, name)
        assert getattr(found, "device", found) == value


def test_a_block_s_tensors_all_have_a_buffer_on_their_way_from_nvme():
    recipe = dataclasses.replace(RECIPE, parallel=dataclasses.replace(
        RECIPE.parallel, offload_optimizer=True, offload_parameters="nvme", nvme_path="/nvme"))  # fmt: skip
    config = make_deepspeed_config(recipe, Group(0, 4, torch.device("cpu")), accumulation=1)["zero_optimization"]
    model = RECIPE.model.build()
    largest = max(model.parameters(), key=torch.Tensor.numel).numel()
    around = [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
    block = max(len(list(block.parameters())) for block in model.blocks)
    where = config["offload_param"]
    assert (where["buffer_count"], where["max_in_cpu"]) == (len(around) + 2 * block, 0)
    assert where["buffer_size"] == -(-largest // 4)


def test_whole_parameters_come_out_of_stage_2(found):
    assert found["whole_matches"]


def test_a_block_costs_one_gather_forward_one_backward_and_one_reduction(found):
    wire = found["wire"]
    assert len(wire["sizes"]) == 3
    assert sorted(wire["blocks"]) == sorted(2 * wire["sizes"])  # each whole, and nothing else that large
    assert wire["blocks"] == wire["sizes"] + wire["sizes"][::-1]
    # In buckets of a block's size, every gradient once: as many reductions as there are blocks.
    assert len(wire["reduced"]) == -(-wire["whole"] // max(wire["sizes"])) == len(wire["sizes"])
    assert sum(wire["reduced"]) == wire["whole"]


@pytest.mark.parametrize(("fp32_reduce", "dtype"), [(True, "torch.float32"), (False, "torch.bfloat16")])
def test_gradients_are_reduced_and_kept_in_the_dtype_that_was_asked_for(found, fp32_reduce, dtype):
    assert found["reductions"][str(fp32_reduce)] == {"sent": [dtype], "kept": [dtype]}


def test_bf16_has_fp32_masters(found):
    assert found["bf16_masters"]
    assert found["bf16_losses"][0] == pytest.approx(found["losses"][0], rel=2e-2)
