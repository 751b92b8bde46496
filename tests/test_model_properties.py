"""Laws that hold for any input: conversions, the shift, position crops, patches, text assembly, names of weights."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.backbones.layers import unpatchify
from model.backbones.mmdit import MMDiTConfig
from model.backbones.position import PositionTable
from model.diffusion.flow import FORMULATIONS, get_formulation
from model.diffusion.grids import make_sampling_grid
from model.diffusion.timesteps import shift_timesteps
from model.encoders.text import EncodedText, EncoderSpec, TextSpec, assemble, make_unconditional
from model.files.names import from_diffusers, from_sd3, to_diffusers, to_sd3

quick = settings(max_examples=30, deadline=None)
inside = st.floats(0.01, 0.99)
shifts = st.floats(0.2, 5.0)


@quick
@given(st.sampled_from(list(FORMULATIONS)), inside, st.integers(0, 2**31))
def test_any_prediction_is_split_and_put_together_again(name: str, t: float, seed: int) -> None:
    """(x0, noise) of an arbitrary prediction lie on the path through z, and give the prediction back."""
    form, g = get_formulation(name), torch.Generator().manual_seed(seed)
    z, prediction = (torch.randn(1, 2, 3, dtype=torch.float64, generator=g) for _ in range(2))
    t_B = torch.tensor([t], dtype=torch.float64)
    x0, noise = form.to_x0(prediction, z, t_B), form.to_noise(prediction, z, t_B)
    size = 1e-9 * float(torch.stack([x0, noise]).abs().max() + 1)
    torch.testing.assert_close(form.sample(x0, noise, t_B).x_t, z, atol=size, rtol=1e-9)
    again = form.from_x0_and_noise(x0, noise, t_B)
    torch.testing.assert_close(again, prediction, atol=10 * size, rtol=1e-8)


@quick
@given(inside, inside, shifts, shifts)
def test_resolution_shifts_compose_and_keep_order(t: float, other: float, one: float, two: float) -> None:
    times = torch.tensor([0.0, min(t, other), max(t, other), 1.0], dtype=torch.float64)
    shifted = shift_timesteps(times, one)
    assert (shifted.diff() >= 0).all()
    assert shifted[0] == 0
    assert abs(float(shifted[-1]) - 1) < 1e-15
    torch.testing.assert_close(shift_timesteps(shifted, two), shift_timesteps(times, one * two))
    torch.testing.assert_close(shift_timesteps(shifted, 1 / one), times)


@quick
@given(st.sampled_from(list(FORMULATIONS)), st.integers(1, 60), shifts)
def test_every_grid_falls_to_zero(name: str, steps: int, shift: float) -> None:
    grid = make_sampling_grid(get_formulation(name), steps, shift=shift)
    assert len(grid) == steps + 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()


@quick
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 3), st.integers(0, 3), st.integers(8, 12))
def test_a_crop_is_the_centre_of_any_larger_crop(rows: int, columns: int, more: int, wider: int, target: int) -> None:
    """For every aspect bucket; growing by an even number keeps the centre."""
    table = PositionTable(16, 12, target=target, base=8)
    large = table(rows + 2 * more, columns + 2 * wider).view(rows + 2 * more, columns + 2 * wider, 16)
    small = table(rows, columns).view(rows, columns, 16)
    assert torch.equal(large[more : more + rows, wider : wider + columns], small)
    turned = table(columns, rows).view(columns, rows, 16)
    assert torch.equal(small[..., :8], turned.transpose(0, 1)[..., 8:])


@quick
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))
def test_patches_come_back_as_latents(rows: int, columns: int, patch: int, channels: int) -> None:
    x = torch.arange(2 * channels * rows * columns * patch**2.0).view(2, channels, rows * patch, columns * patch)
    tokens = torch.stack(
        [
            x[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].permute(0, 2, 3, 1).flatten(1)
            for r, c in itertools.product(range(rows), range(columns))
        ],
        dim=1,
    )
    assert torch.equal(unpatchify(tokens, rows, columns, patch), x)


SPEC = TextSpec(
    (
        EncoderSpec("clip_l", "l", "open_clip", 5, 4, 3),
        EncoderSpec("clip_g", "g", "open_clip", 5, 6, 2),
        EncoderSpec("t5", "t", "t5_hf", 4, 12, 0),
    ),
    "trimmed",
    12,
)
captions = st.lists(st.tuples(*(st.integers(1, n) for n in (5, 5, 4)), *[st.booleans()] * 3), min_size=1, max_size=5)


@quick
@given(captions, st.randoms(use_true_random=False))
def test_text_of_a_caption_does_not_depend_on_its_batch(rows: list, random) -> None:
    """Shuffling the batch shuffles the result; a row whose encoders are all dropped is the unconditional one."""
    g = torch.Generator().manual_seed(len(rows))
    states = [[(torch.randn(row[i], e.width, generator=g), torch.randn(e.pooled, generator=g))
               for i, e in enumerate(SPEC.encoders)] for row in rows]  # fmt: skip

    def batch(order: list[int]):
        features = {
            e.seat: EncodedText.stack(*zip(*[states[n][i] for n in order], strict=True))
            for i, e in enumerate(SPEC.encoders)
        }
        dropped = {e.seat: torch.tensor([rows[n][3 + i] for n in order]) for i, e in enumerate(SPEC.encoders)}
        return assemble(SPEC, features, dropped)

    whole, order = batch(list(range(len(rows)))), list(range(len(rows)))
    random.shuffle(order)
    shuffled, nothing = batch(order), make_unconditional(SPEC, 1)
    assert whole.mask_BL is not None
    for field in ("context_BLD", "pooled_BP", "mask_BL"):
        assert torch.equal(getattr(shuffled, field), getattr(whole, field)[order])
        for n, row in enumerate(rows):
            assert torch.equal(getattr(batch([n]), field)[0], getattr(whole, field)[n])
            if all(row[3:]):
                assert torch.equal(getattr(whole, field)[n], getattr(nothing, field)[0])
    assert whole.context_BLD[~whole.mask_BL].abs().sum() == 0


@st.composite
def configs(draw: st.DrawFn) -> MMDiTConfig:
    depth = draw(st.integers(1, 3))
    return MMDiTConfig(
        depth=depth,
        patch=draw(st.integers(1, 3)),
        in_channels=draw(st.integers(1, 5)),
        context_width=draw(st.integers(1, 9)),
        pooled_width=draw(st.integers(1, 9)),
        qk_norm=draw(st.booleans()),
        dual_attention=tuple(sorted(draw(st.sets(st.integers(0, depth - 2))))) if depth > 1 else (),
        pos_max=4,
        pos_tokens=4,
        pos_base=draw(st.integers(1, 4)),
    )


@settings(max_examples=12, deadline=None)
@given(configs())
def test_weights_of_any_config_survive_both_dialects(config: MMDiTConfig) -> None:
    state = config.build(seed=1).state_dict()
    numbered = {name: torch.full_like(x, n) + torch.arange(x.numel()).view(x.shape) for n, (name, x) in
                enumerate(state.items())}  # fmt: skip
    found, back = from_sd3(dict(to_sd3(config, numbered)), "test")
    assert {**found.to_json(), "pos_stored": False, "pos_tokens": 4, "pos_base": config.pos_base} == config.to_json()
    other = from_diffusers(config, dict(to_diffusers(config, numbered)), "test")
    for name, value in numbered.items():
        assert torch.equal(back[name], value), name
        assert torch.equal(other[name], value), name
