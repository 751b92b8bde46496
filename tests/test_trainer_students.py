"""Distillation, MeanFlow and PeRFlow: exact on straight and analytic flows, what is refused, what they cost."""
# Shapes: B batch, C latent channels, H and W latent height and width.

import contextlib
import dataclasses
import math

import pytest
import torch
from test_model_backbones import NAMES, inputs, random_model
from test_trainer_reflow import FORM, batch_of, straight

from data_pipeline.checkpoints import resolve
from infra.errors import UserError
from model.diffusion.few_step import FewStep
from model.diffusion.flow import get_formulation
from model.diffusion.grids import make_sampling_grid
from model.diffusion.sampler import solve
from model.encoders.text import TextCond
from model.encoders.vae import Latents, load_vae
from model.float32 import InFloat32
from model.perceptual import load_perceptual
from trainer.feed import DeviceBatch
from trainer.objective import bind_objective, check_objective, count_train_flops
from trainer.perceptual import PerceptualLoss
from trainer.planning.estimates import count_bytes_moved
from trainer.recipe import Parallel, Student
from trainer.recipes import get_recipe
from trainer.students import StudentLoss, differ, distil, find_window, meanflow, perflow, round_up

L2 = StudentLoss("l2", 1.0)


class Plain:
    """A function as the network of an objective; double precision needs no more of it. `taught`: the frozen teacher, of
    (x, t, text)."""

    def __init__(self, function, taught=None):
        self.function, self._taught, self._asks_teacher = function, taught, False

    def __call__(self, x, t, text, r=None):
        return self._taught(x, t, text) if self._asks_teacher else self.function(x, t, r)

    @contextlib.contextmanager
    def teacher(self):
        self._asks_teacher = True
        with torch.no_grad():
            yield
        self._asks_teacher = False

    def precise(self):
        return torch.no_grad()

    without_gradients = precise


def go_backward(losses, scale=1.0):
    (scale * losses.loss_B.mean()).backward()
    for loss in losses.earlier(scale):
        (scale * loss).backward()


# --- distillation


@pytest.mark.parametrize("states", ["line", "rollout"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_distillation_of_a_straight_flow_is_at_zero(steps, states, shift):
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)

    network = Plain(lambda x, t, r: factor * straight(0.2)(x, t, None))
    found = distil(network, batch_of(0.2), formulation=FORM, loss=L2, steps=steps, shift=shift, states=states)
    assert found.loss_B.abs().max() < 1e-28
    go_backward(found)
    assert abs(factor.grad.item()) < 1e-12


def test_one_step_is_the_same_loss_from_the_line_and_by_rollout():
    batch = batch_of(0.5)
    options = {"formulation": FORM, "loss": StudentLoss("huber", 0.01), "steps": 1, "shift": 1.0}
    line, rolled = (
        distil(Plain(lambda x, t, r: 0.3 * x), batch, states=states, **options).loss_B for states in ("line", "rollout")
    )
    torch.testing.assert_close(line, rolled, rtol=1e-12, atol=0)
    assert line.min() > 0.01


@pytest.mark.parametrize("steps", [2, 4])
def test_the_gradient_of_a_rollout_goes_back_through_all_steps(steps):
    """For the field c x, k Euler steps of 1/k arrive at (1 - c/k)^k of the noise; so loss and slope are known."""
    batch, c = batch_of(0.2), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    network = Plain(lambda x, t, r: c * x)
    losses = distil(network, batch, formulation=FORM, loss=L2, steps=steps, shift=1.0, states="rollout")
    go_backward(losses, scale=0.25)
    loss = losses.loss_B.mean()
    arrives, squared = (1 - 0.7 / steps) ** steps, batch.noise_BCHW.square().mean().item()
    assert loss.item() == pytest.approx((arrives - 0.2) ** 2 * squared, rel=1e-12)
    slope = 2 * (arrives - 0.2) * -((1 - 0.7 / steps) ** (steps - 1)) * squared
    assert c.grad.item() == pytest.approx(0.25 * slope, rel=1e-12)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_uniform_times_fall_equally_often_on_the_points_of_the_grid(shift):
    grid = make_sampling_grid(FORM, 4, shift=shift)
    t = get_formulation("rf").draw_timesteps(torch.linspace(0, 1, 40_001, dtype=torch.float64), shift)
    found, counts = round_up(t, grid).unique(return_counts=True)
    assert torch.equal(found.flip(0), grid[:-1])
    assert (counts - 10_000).abs().max() <= 1
    assert torch.equal(round_up(grid[:-1], grid), grid[:-1])


# --- MeanFlow


@pytest.mark.parametrize("a", [-2.0, 0.5, 3.0])
def test_meanflow_s_identity_on_an_exponential_flow(a):
    """x_t = e^(at): v = a x, and the mean velocity from t to r is x (1 - e^(-a (t-r))) / (t-r)."""
    t = torch.tensor([0.3, 0.6, 1.0, 1.0, 0.5], dtype=torch.float64)
    r = torch.tensor([0.0, 0.55, 0.2, 1.0, 0.5], dtype=torch.float64)

    def u(at):
        interval = at - r
        safe = interval.where(interval != 0, torch.ones_like(interval))
        return torch.where(interval == 0, a * torch.exp(a * at), torch.exp(a * at) * -torch.expm1(-a * safe) / safe)

    found = a * torch.exp(a * t) - (t - r) * differ(u, t, r, difference=1e-5)
    torch.testing.assert_close(found, u(t), rtol=3e-4, atol=0)
    torch.testing.assert_close(found[:2], u(t)[:2], rtol=1e-8, atol=0)  # central
    assert torch.equal(found[3:], u(t)[3:])  # r = t: the velocity itself


def test_the_difference_is_of_second_order_inside_and_of_first_at_the_end():
    t, r = torch.tensor([0.5, 1.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    errors = [(differ(torch.sin, t, r, difference=h) - torch.cos(t)).abs() for h in (0.02, 0.01)]
    ratio = errors[0] / errors[1]
    assert ratio[0].item() == pytest.approx(4, rel=1e-2)
    assert ratio[1].item() == pytest.approx(2, rel=1e-2)


def test_the_loss_of_meanflow_against_its_formula():
    """u = sin(3t) x + r t^2 on the pair's line: du/dt = sin(3t) v + 3 cos(3t) x + 2 r t."""
    batch = batch_of(0.5)
    x0, e, t = batch.x0_BCHW, batch.noise_BCHW, batch.t_B.view(-1, 1, 1, 1)
    r = 0.4 * t
    network = Plain(lambda x, t, r: shaped(torch.sin(3 * t)) * x + shaped(r * t * t))
    given = batch._replace(r_B=r.flatten())
    found = meanflow(network, given, formulation=FORM, loss=L2, difference=1e-5).loss_B
    x, v = (1 - t) * x0 + t * e, e - x0
    target = v - (t - r) * (torch.sin(3 * t) * v + 3 * torch.cos(3 * t) * x + 2 * r * t)
    expected = (torch.sin(3 * t) * x + r * t * t - target).square().mean((1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


def shaped(x_B):
    return x_B.view(-1, 1, 1, 1)


def test_meanflow_of_a_straight_flow_is_at_zero():
    batch = batch_of(0.2)
    given = batch._replace(r_B=0.3 * batch.t_B)
    field = straight(0.2)
    found = meanflow(Plain(lambda x, t, r: field(x, t, None)), given, formulation=FORM, loss=L2, difference=0.005)
    assert found.loss_B.abs().max() < 1e-20


# --- a frozen teacher on ordinary data


def guided(rate, with_text, without):
    """A linear velocity field, `rate` x; guidance changes the rate from `without` text to `with_text`."""

    def velocity(x, t, text):
        told_B = (text.pooled_BP.abs().sum(1) > 0).to(x)
        return rate * (without + (with_text - without) * told_B).view(-1, 1, 1, 1) * x

    return velocity


def worded(batch: DeviceBatch) -> DeviceBatch:
    """The batch with text that is not the unconditional input."""
    count = len(batch.t_B)
    return batch._replace(text=TextCond(torch.ones(count, 3, 4), torch.ones(count, 2)))


@pytest.mark.parametrize(("guidance", "rate"), [(1.0, 0.7), (3.0, 0.7 + 2 * (0.7 - 0.2)), (0.0, 0.2)])
@pytest.mark.parametrize(("windows", "shift"), [(1, 1.0), (4, 1.0), (4, 3.0)])
def test_perflow_regresses_the_line_that_the_guided_teacher_s_steps_end_on(windows, shift, guidance, rate):
    batch, steps = worded(batch_of(0.5)), 3
    grid = make_sampling_grid(FORM, windows, shift=shift)
    upper_B, lower_B = (t_B.view(-1, 1, 1, 1) for t_B in find_window(batch.t_B, grid))
    start = (1 - upper_B) * batch.x0_BCHW + upper_B * batch.noise_BCHW
    end = start * (1 - rate * (upper_B - lower_B) / steps) ** steps
    asked = {}

    def student(x, t, r):
        asked["x"] = x
        return 0 * x

    network = Plain(student, guided(1.0, 0.7, 0.2))
    options = {"windows": windows, "shift": shift, "guidance": guidance, "teacher_steps": steps}
    found = perflow(network, batch, formulation=FORM, loss=L2, **options)
    target = (start - end) / (upper_B - lower_B)
    torch.testing.assert_close(found.loss_B, target.square().mean((1, 2, 3)))
    share = (batch.t_B.view(-1, 1, 1, 1) - lower_B) / (upper_B - lower_B)
    torch.testing.assert_close(asked["x"], (1 - share) * end + share * start)


def test_a_straight_teacher_stays_as_it_is_under_perflow():
    def velocity(x, t, text):
        return torch.full_like(x, 0.3)

    network = Plain(lambda x, t, r: torch.full_like(x, 0.3), velocity)
    batch = worded(batch_of(0.5))
    found = perflow(
        network, batch, formulation=FORM, loss=L2, windows=2, shift=1.0, guidance=1.0, teacher_steps=2
    )  # fmt: skip
    assert found.loss_B.abs().max() < 1e-28


def test_a_time_lies_in_the_window_whose_upper_end_it_may_be():
    grid = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    upper_B, lower_B = find_window(torch.tensor([0.0, 0.1, 0.5, 0.6, 1.0], dtype=torch.float64), grid)
    assert upper_B.tolist() == [0.5, 0.5, 0.5, 1.0, 1.0]
    assert lower_B.tolist() == [0.0, 0.0, 0.0, 0.5, 0.5]


@pytest.mark.parametrize(("guidance", "rate"), [(1.0, 0.7), (3.0, 1.7)])
def test_meanflow_of_a_teacher_is_at_zero_for_the_mean_velocity_of_its_flow(guidance, rate):
    """dx/dt = a x has u(x, r, t) = x (1 - exp(-a (t - r))) / (t - r)."""
    t_B = torch.linspace(0.2, 0.8, 6, dtype=torch.float64)
    batch = worded(batch_of(0.5))._replace(t_B=t_B, r_B=t_B / 3)

    def mean_velocity(x, t, r):
        span = (t - r).view(-1, 1, 1, 1)
        return x * (1 - torch.exp(-rate * span)) / span

    network = Plain(mean_velocity, guided(1.0, 0.7, 0.2))
    errors = [
        meanflow(network, batch, formulation=FORM, loss=L2, difference=h, guidance=guidance).loss_B.sqrt().max().item()
        for h in (1e-2, 1e-3)
    ]
    assert errors[1] < 1e-6
    assert errors[1] < errors[0] / 50  # of second order in the difference


def test_the_teacher_s_tangent_is_the_pair_s_own_line_where_the_teacher_knows_the_pair():
    batch = worded(batch_of(0.5))
    batch = batch._replace(r_B=batch.t_B / 3)
    network = Plain(lambda x, t, r: 0.1 * x, lambda x, t, text: batch.noise_BCHW - batch.x0_BCHW)
    options = {"formulation": FORM, "loss": L2, "difference": 0.01}
    asked, coupled = (meanflow(network, batch, **options, guidance=each).loss_B for each in (1.0, None))
    torch.testing.assert_close(asked, coupled)


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_in_fp32_of_bf16_weights_is_that_of_the_same_weights_in_fp32(name):
    model = random_model(name, second_time=True).bfloat16()
    x, t, text = inputs()
    with torch.no_grad():
        with InFloat32():
            found = model(x, t, text, 0.5 * t)
        expected = model.float()(x, t, text, 0.5 * t)
    assert torch.equal(found, expected)


# --- pictures


@pytest.fixture(scope="module")
def world_pictures():
    latents = Latents.of(load_vae(resolve("world:vae")).config, "world:vae")
    return PerceptualLoss("features:world:clip", latents, device=torch.device("cpu"))


def test_a_perceptual_loss_adds_to_the_one_in_latents(world_pictures):
    """Nothing for equal latents; a gradient for the student's alone; the sum is weighed as the recipe says."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 8, 16, 16, generator=generator) for _ in range(2))
    a.requires_grad_()
    far = world_pictures(a, b)
    assert far.shape == (2,)
    assert world_pictures(b, b).max() < 1e-9
    assert far.min() > 0.01
    far.sum().backward()
    assert a.grad.abs().min(0).values.max() > 0
    loss = StudentLoss("l2", 1.0, latent_weight=0.5, perceptual_weight=2.0, perceptual=world_pictures)
    found = loss(a, b, x0_hat_BCHW=a, x0_BCHW=b)
    torch.testing.assert_close(found.loss_B, 0.5 * L2(a, b, x0_hat_BCHW=a, x0_BCHW=b).loss_B + 2 * far)
    assert set(found.figures) == {"student/latent", "student/perceptual"}
    assert not any(figure.requires_grad for figure in found.figures.values())


def test_features_of_a_vision_model_of_transformers(tmp_path):
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    CLIPVisionModel(config).save_pretrained(tmp_path)
    CLIPImageProcessor().save_pretrained(tmp_path)
    distance = load_perceptual("features", tmp_path)
    a, b = torch.zeros(2, 3, 48, 48), torch.linspace(-1, 1, 2 * 3 * 48 * 48).view(2, 3, 48, 48)
    assert distance(a, a).max() < 1e-9
    assert distance(a, b).min() > 1e-4
    with pytest.raises(UserError, match="no vision model at"):
        load_perceptual("features", tmp_path / "nowhere")


# --- samplers


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_average_velocities_reach_the_end_exactly_in_any_number_of_steps(steps):
    """The exponential flow x_t = x_0 e^(2t), from x_1 = noise."""

    def network(x, t, text, r):
        interval = t - r
        return x * shaped(-torch.expm1(-2 * interval) / interval)

    noise = batch_of(1.0).noise_BCHW
    student = FewStep("meanflow", average=True)
    found = solve(network, noise, batch_of(1.0).text, steps=steps, formulation="rf", student=student).latents
    torch.testing.assert_close(found, noise * math.exp(-2), rtol=1e-12, atol=0)


def test_students_are_sampled_as_they_were_trained():
    four = FewStep("distil", steps=4)
    assert four.step_counts == [1, 2, 4]
    four.check(steps=2, guidance=4.0, solver="euler")
    for steps in (8, 3):
        with pytest.raises(UserError, match=r"grid of 4 steps.*give --steps 1 or 2 or 4"):
            four.check(steps=steps, guidance=1.0, solver="euler")
    with pytest.raises(UserError, match="takes whole steps, not solver heun"):
        FewStep("meanflow", average=True).check(steps=25, guidance=1.0, solver="heun")
    FewStep("reflow").check(steps=25, guidance=2.0, solver="heun")
    with pytest.raises(UserError, match="baked in"):
        FewStep("reflow", guidance=1.5, guidance_kind="baked").check(steps=1, guidance=2.0, solver="euler")
    assert FewStep.of({"run": "teacher"}) is None


# --- recipes


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("world-distil-d2", {"formulation": "rf/lognorm(0.00,1.00)"}, "give --formulation 'rf', or"),
        ("world-distil-d2", {"student": Student(perceptual="vgg:FILE")}, "expected KIND:PATH with KIND features"),
        ("world-distil-d2", {"student": Student(perceptual="features:nowhere")}, "no checkpoint at 'nowhere'"),
        ("world-meanflow-d2", {"student": Student(perceptual="features:world:clip")}, "has no perceptual loss"),
        ("world-meanflow-d2", {"model": get_recipe("world-d2").model}, "give --model.second-time"),
        ("world-meanflow-d2", {"objective": "distil"}, "give --objective meanflow"),
        ("world-meanflow-d2", {"student": Student(guidance=1.5)}, "validated on ordinary held-out data"),
        ("world-perflow-d2", {"student": Student()}, "asks a frozen teacher: give --student.guidance, 1 for none"),
        ("world-perflow-d2", {"student": Student(guidance=math.nan)}, "expected a finite number"),
        ("world-perflow-d2", {"formulation": "eps/cos"}, "regresses the velocity of a rectified flow"),
        ("world-perflow-d2", {"student": Student(guidance=1.0, perceptual="features:world:clip")}, "no perceptual"),
        ("world-perflow-d2", {"validation": get_recipe("world-reflow-d2").validation}, "ordinary held-out data"),
        ("world-distil-d2", {"student": Student(guidance=1.5)}, "asks no teacher in training"),
        ("world-d2", {"student": Student(guidance=1.5)}, "asks no teacher in training"),
        ("world-d2", {"model": get_recipe("world-meanflow-d2").model}, "give --objective meanflow"),
    ],
)
def test_recipes_that_cannot_work_are_refused(name, changes, says):
    with pytest.raises(UserError, match=says):
        check_objective(dataclasses.replace(get_recipe(name), **changes))


def test_recipes_that_work_and_what_they_cost():
    distilled = get_recipe("world-distil-d2")
    student = Student(steps=4, states="rollout", perceptual="features:world:clip")
    rolled = dataclasses.replace(distilled, student=student)
    check_objective(rolled)
    check_objective(get_recipe("world-meanflow-d2"))
    asking = get_recipe("world-perflow-d2")
    guided_one = dataclasses.replace(asking, student=dataclasses.replace(asking.student, guidance=1.5))
    forward = asking.model.count_forward_flops(16, 16, 32)
    assert count_train_flops(asking) == count_train_flops(get_recipe("world-d2")) + 8 * forward
    assert count_train_flops(guided_one) == count_train_flops(asking) + 8 * forward
    # A teacher's weights come and go in each micro-batch, and guidance shares a pass.
    moved = {
        (name, stage): count_bytes_moved(
            dataclasses.replace(recipe, precision="fp32", parallel=Parallel(zero_stage=stage, max_live=0)), world_size=2
        )
        for name, recipe in (("plain", get_recipe("world-d2")), ("asking", asking), ("guided", guided_one))
        for stage in (2, 3)
    }  # fmt: skip
    assert moved["asking", 3]["forward"] == 9 * moved["plain", 3]["forward"]
    assert moved["asking", 2]["publish"] == 3 * moved["plain", 2]["publish"]
    assert all(moved["guided", stage] == moved["asking", stage] for stage in (2, 3))
    assert count_train_flops(rolled) == 5 * count_train_flops(distilled)  # 3 passes more, 4 with a gradient
    base = dataclasses.replace(distilled, precision="fp32")
    variants = [dataclasses.replace(base, student=Student(**each)) for each in (
        {"steps": 2}, {"states": "rollout"}, {"perceptual": "features:world:clip"}, {"difference": 0.01},
        {"equal_times": 0.6}, {"to_zero": 0.1}, {"latent_weight": 0.0}, {"perceptual_weight": 2.0},
        {"guidance": 1.0}, {"teacher_steps": 4})]  # fmt: skip
    assert len({recipe.hash for recipe in [base, *variants]}) == 11


def test_the_loss_of_a_recipe_is_bound_with_its_options():
    recipe = dataclasses.replace(get_recipe("world-distil-d2"), student=Student(steps=2, states="rollout"))
    given = batch_of(0.2)
    found = bind_objective(recipe)(Plain(lambda x, t, r: 0 * x), given)
    expected = (given.noise_BCHW - given.x0_BCHW).square().mean((1, 2, 3))
    torch.testing.assert_close(found.loss_B, expected)
