"""The network's signature (x, t, text, r): times of tokens, and the second time of average velocities."""
# Shapes: B batch, C latent channels, H and W latent height and width, N image tokens.

import dataclasses

import pytest
import torch
from test_model_backbones import NAMES, inputs, random_model, small

from infra.errors import UserError
from model.backbones.layers import FinalLayer
from model.backbones.mmdit import MMDiTConfig
from model.bfloat16 import convert_to_bfloat16
from model.files.names import to_diffusers, to_sd3
from model.files.weights import load_model, save_weights
from trainer.exports.export import open_weights


def with_second_time(name: str, model, folder):
    """A network that takes r, filled from the weights of one that does not, as the trainer fills it."""
    config = model.config
    meta = {"kind": "ema", "backbone": name, "config": config.to_json()}
    path = save_weights(folder / f"{name}.safetensors", model.state_dict(), meta)
    student = dataclasses.replace(config, second_time=True).build()
    read = open_weights(str(path), {n: tuple(p.shape) for n, p in student.named_parameters()})
    with torch.no_grad():
        for parameter_name, parameter in student.named_parameters():
            parameter.copy_(read(parameter_name))
    return student


@pytest.mark.parametrize("name", NAMES)
def test_a_student_with_a_second_time_begins_as_its_teacher_to_the_bit(name, tmp_path):
    teacher = random_model(name)
    student = with_second_time(name, teacher, tmp_path)
    x, t, text = inputs()
    expected = teacher(x, t, text)
    for r in (t, None, torch.zeros_like(t)):
        assert torch.equal(student(x, t, text, r), expected)
    with torch.no_grad():
        student.condition.interval.outer.weight.normal_(std=0.1)
    assert torch.equal(student(x, t, text, t), student(x, t, text)), "without r it is t"
    assert (student(x, t, text, 0.5 * t) - student(x, t, text)).abs().max() > 1e-4
    assert not torch.equal(convert_to_bfloat16(student)(x, t, text, 0.5 * t), convert_to_bfloat16(student)(x, t, text))


@pytest.mark.parametrize("name", NAMES)
def test_equal_times_of_all_tokens_are_the_time_of_the_sample(name):
    model = random_model(name, second_time=True)
    x, t, text = inputs(12, 20)
    t_BN = t[:, None].expand(-1, 60).clone()
    torch.testing.assert_close(model(x, t_BN, text, 0.5 * t_BN), model(x, t, text, 0.5 * t), atol=2e-5, rtol=1e-4)
    moved = t_BN.clone()
    moved[0, 7] = 1 - moved[0, 7]
    change_BCHW = (model(x, moved, text) - model(x, t_BN, text)).abs()
    assert change_BCHW[0].max() > 1e-4
    assert change_BCHW[1].max() == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "uvit"])
def test_each_token_is_modulated_by_its_own_time(name):
    """Fresh blocks pass tokens on unchanged; then the last layer alone sees times, each token's own."""
    model = small(name).build()
    generator = torch.Generator().manual_seed(0)
    assert isinstance(model.final, FinalLayer)
    with torch.no_grad():
        for parameter in model.final.parameters():
            parameter.normal_(std=0.3, generator=generator)
    x, _, text = inputs()
    t_BN = torch.full((2, 64), 0.25)
    t_BN[:, 9] = 0.75  # the token of row 1, column 1: patches of 2 x 2
    found = model(x, t_BN, text)
    outside, inside = (model(x, torch.full((2,), time), text) for time in (0.25, 0.75))
    expected = outside.clone()
    expected[:, :, 2:4, 2:4] = inside[:, :, 2:4, 2:4]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert (inside - outside).abs().min(0).values[:, 2:4, 2:4].max() > 1e-4


def test_wrong_times_are_refused():
    x, t, text = inputs()
    with pytest.raises(UserError, match="has none: its config lacks second_time"):
        small("mmdit").build()(x, t, text, t)
    model = small("mmdit", second_time=True).build()
    with pytest.raises(UserError, match=r"second times of shape \(1,\) beside times of shape \(2,\)"):
        model(x, t, text, t[:1])
    with pytest.raises(UserError, match=r"times of shape \(2, 63\)"):
        model(x, torch.zeros(2, 63), text)


def test_other_formats_have_no_seat_for_it(tmp_path):
    config = MMDiTConfig(depth=1, in_channels=4, context_width=48, pooled_width=24, second_time=True)
    model = config.build()
    for convert in (to_sd3, to_diffusers):
        with pytest.raises(UserError, match="no seat for a second time"):
            next(convert(config, model.state_dict()))
    meta = {"kind": "ema", "backbone": "mmdit", "config": config.to_json()}
    loaded, _ = load_model(save_weights(tmp_path / "w.safetensors", model.state_dict(), meta))
    assert loaded.config == config
