"""Objectives of students: they learn from couplings (a noise and the latent that a teacher's solver made of it), or
from a frozen teacher that is asked in training."""
# Shapes: B batch, C latent channels, H and W latent height and width, K steps of the student.

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.diffusion.flow import FlowSample, Formulation, broadcast_like
from model.diffusion.grids import make_sampling_grid
from model.diffusion.sampler import add_guidance
from trainer.feed import DeviceBatch
from trainer.network import Losses, Network
from trainer.regression import RegressionLoss, compute_regression_loss

States = Literal["line", "rollout"]


@dataclass(frozen=True)
class StudentLoss:
    """What is asked of a student's answer: its error in latents, and how far apart the decoded pictures are."""

    loss: RegressionLoss
    huber: float
    latent_weight: float = 1.0
    perceptual_weight: float = 1.0
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
    """Distance of two batches of latents as pictures, (B); None: latents alone."""

    def __call__(self, prediction: Tensor, target: Tensor, *, x0_hat_BCHW: Tensor, x0_BCHW: Tensor) -> Losses:
        """`prediction` against `target` in latents, and the latent that the student arrives at against `x0_BCHW`."""
        latent_B = compute_regression_loss(prediction, target, loss=self.loss, huber=self.huber)
        if self.perceptual is None:
            return Losses(latent_B)
        perceptual_B = self.perceptual(x0_hat_BCHW, x0_BCHW)
        figures = {"student/latent": latent_B.detach(), "student/perceptual": perceptual_B.detach()}
        return Losses(self.latent_weight * latent_B + self.perceptual_weight * perceptual_B, figures)


def reflow(network: Network, batch: DeviceBatch, *, formulation: Formulation, loss: StudentLoss) -> Losses:
    """Rectified flow of a teacher's couplings (Liu et al., arXiv 2209.03003): |v((1-t) x0 + t e, t) - (e - x0)|^2.

    The pair (e, x0) is the teacher's own: e goes to x0 along its flow. At the optimum the student keeps the marginals
    and is straighter. A flow that is straight already has the loss 0 and stays as it is.
    """
    return _regress_line(network, batch, formulation=formulation, loss=loss)


def distil(
    network: Network, batch: DeviceBatch, *, formulation: Formulation, loss: StudentLoss, steps: int, shift: float,
    states: States,
) -> Losses:  # fmt: skip
    """Distillation to `steps` steps on the student's own grid (InstaFlow, arXiv 2309.06380, eq. 6, for one step).

    States `line`: each drawn time moves up to the next time of the grid, and the student is asked there for the
    velocity of the pair's straight line, as in the code of Rectified Flow. That is where its sampler comes by only if
    the flow is straight. `rollout`: the student takes all its steps from the noise, and what it arrives at is asked to
    be the teacher's latent; the gradient goes back through all steps. With one step both are the same loss.
    """
    grid = make_sampling_grid(formulation, steps, shift=shift)
    if states == "line":
        t_B = round_up(batch.t_B, grid)
        return _regress_line(network, batch._replace(t_B=t_B), formulation=formulation, loss=loss)
    rollout = Rollout(network, batch, grid)
    x0_hat_BCHW = rollout.step(steps - 1)
    losses = loss(x0_hat_BCHW, batch.x0_BCHW, x0_hat_BCHW=x0_hat_BCHW, x0_BCHW=batch.x0_BCHW)
    return losses._replace(earlier=rollout.go_back)


def _regress_line(network: Network, batch: DeviceBatch, *, formulation: Formulation, loss: StudentLoss) -> Losses:
    sample = formulation.sample(batch.x0_BCHW, batch.noise_BCHW, batch.t_B)
    v_BCHW = network(sample.model_input, sample.network_time_B, batch.text)
    x0_hat_BCHW = sample.x_t - broadcast_like(batch.t_B, v_BCHW) * v_BCHW
    return loss(v_BCHW, sample.target, x0_hat_BCHW=x0_hat_BCHW, x0_BCHW=batch.x0_BCHW)


def round_up(t_B: Tensor, grid: Tensor) -> Tensor:
    """Each time moved up to the next one of a grid that falls from noise to 0, which is none of them.

    With uniform times, shifted as the grid is, all times of the grid are equally likely.
    """
    return find_window(t_B, grid)[0]


def find_window(t_B: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """The neighbouring times of a grid (which falls from noise to 0) between which each time lies, the upper one
    first; a time of the grid is an upper one."""
    rising = grid.flip(0).to(t_B)
    upper_B = torch.searchsorted(rising, t_B).clamp(1, len(rising) - 1)
    return rising[upper_B], rising[upper_B - 1]


class Rollout:
    """The student's own Euler steps over a grid, from the noise. State and times are fp32.

    The states are found without gradients. Then each step is taken once more, the last one first, and hands the
    gradient of its state to the step before. So one pass is kept at a time, whatever the number of steps.
    """

    def __init__(self, network: Network, batch: DeviceBatch, grid: Tensor) -> None:
        self._network, self._text, self._grid = network, batch.text, grid
        self._states = [batch.noise_BCHW]
        for number in range(len(grid) - 2):
            with network.without_gradients():
                state_BCHW = self.step(number)
            self._states.append(state_BCHW.detach().requires_grad_())

    def step(self, number: int) -> Tensor:
        """The state after step `number`."""
        x_BCHW, at, to = self._states[number], self._grid[number].item(), self._grid[number + 1].item()
        precise = torch.promote_types(x_BCHW.dtype, torch.float32)
        t_B = torch.full((len(x_BCHW),), at, dtype=precise, device=x_BCHW.device)
        return x_BCHW + (to - at) * self._network(x_BCHW, t_B, self._text)

    def go_back(self, scale: float) -> Iterator[Tensor]:
        """For each step but the last one, a scalar whose gradient is the loss's through it. Every one is asked for
        after the backward pass of the one before, which scaled its loss by `scale`."""
        for number in reversed(range(len(self._states) - 1)):
            wanted_BCHW = self._states[number + 1].grad
            if wanted_BCHW is None:
                raise RuntimeError("the step after this one had no backward pass")
            yield (self.step(number) * (wanted_BCHW / scale)).sum()


def perflow(
    network: Network, batch: DeviceBatch, *, formulation: Formulation, loss: StudentLoss, windows: int, shift: float,
    guidance: float, teacher_steps: int,
) -> Losses:  # fmt: skip
    """PeRFlow (arXiv 2405.07510): the flow is made straight in each of `windows` windows of time, on ordinary data.

    A noised latent at the upper end of a window is taken to its lower end by `teacher_steps` Euler steps of the guided
    teacher. The student regresses the velocity of the line between the two. Windows are the steps of the sampling grid.
    """
    grid = make_sampling_grid(formulation, windows, shift=shift)
    upper_B, lower_B = find_window(batch.t_B, grid)
    start_BCHW = formulation.sample(batch.x0_BCHW, batch.noise_BCHW, upper_B).x_t
    end_BCHW, step_B = start_BCHW, (lower_B - upper_B) / teacher_steps
    with network.teacher():
        predict = add_guidance(network, batch.text, batch.text.zeros_like(), guidance)
        for number in range(teacher_steps):
            velocity_BCHW = predict(end_BCHW, _to_network_time(upper_B + number * step_B, end_BCHW))
            end_BCHW = end_BCHW + broadcast_like(step_B, end_BCHW) * velocity_BCHW
    target_BCHW = (start_BCHW - end_BCHW) / broadcast_like(upper_B - lower_B, start_BCHW)
    x_BCHW = end_BCHW + broadcast_like(batch.t_B - lower_B, end_BCHW) * target_BCHW
    v_BCHW = network(x_BCHW, _to_network_time(batch.t_B, x_BCHW), batch.text)
    reached_BCHW = x_BCHW - broadcast_like(batch.t_B - lower_B, v_BCHW) * v_BCHW
    return loss(v_BCHW, target_BCHW, x0_hat_BCHW=reached_BCHW, x0_BCHW=end_BCHW)


def _to_network_time(t_B: Tensor, x_BCHW: Tensor) -> Tensor:
    """Times as a network of a rectified flow reads them: never below fp32."""
    return t_B.to(x_BCHW.device, torch.promote_types(x_BCHW.dtype, torch.float32))


def meanflow(
    network: Network, batch: DeviceBatch, *, formulation: Formulation, loss: StudentLoss, difference: float,
    guidance: float | None = None,
) -> Losses:  # fmt: skip
    """MeanFlow (arXiv 2505.13447): u(x_t, r, t) is the mean velocity from t down to r <= t.

    On couplings (`guidance` None) the velocity is the pair's own, e - x0 (Re-MeanFlow, arXiv 2511.23342), and the path
    is the pair's line. On ordinary data the velocity is the guided teacher's at x_t, and the path is the tangent that
    it gives there. Passes of the difference compute in fp32 without gradient. All passes have the same text and so the
    same dropped encoders.
    """
    if guidance is not None:
        batch = _replace_by_tangent(network, batch, formulation=formulation, guidance=guidance)
    if batch.r_B is None:
        raise ValueError("meanflow needs second times: the recipe's network has second_time")
    t_B, r_B = batch.t_B, batch.r_B

    def predict(at_B: Tensor) -> tuple[Tensor, FlowSample]:
        sample = formulation.sample(batch.x0_BCHW, batch.noise_BCHW, at_B)
        r = r_B.to(sample.network_time_B)
        return network(sample.model_input, sample.network_time_B, batch.text, r), sample

    def predict_precisely(at_B: Tensor) -> Tensor:
        with network.precise():
            return predict(at_B)[0]

    change_BCHW = differ(predict_precisely, t_B, r_B, difference=difference)
    u_BCHW, sample = predict(t_B)
    target_BCHW = sample.target - broadcast_like(t_B - r_B, change_BCHW) * change_BCHW
    x0_hat_BCHW = sample.x_t - broadcast_like(t_B, u_BCHW) * u_BCHW
    return loss(u_BCHW, target_BCHW, x0_hat_BCHW=x0_hat_BCHW, x0_BCHW=batch.x0_BCHW)


def _replace_by_tangent(
    network: Network, batch: DeviceBatch, *, formulation: Formulation, guidance: float
) -> DeviceBatch:
    """The batch whose latent and noise are the ends of the line through x_t along the guided teacher's velocity."""
    sample = formulation.sample(batch.x0_BCHW, batch.noise_BCHW, batch.t_B)
    with network.teacher():
        predict = add_guidance(network, batch.text, batch.text.zeros_like(), guidance)
        v_BCHW = predict(sample.model_input, sample.network_time_B)
    t_BCHW = broadcast_like(batch.t_B, v_BCHW)
    return batch._replace(x0_BCHW=sample.x_t - t_BCHW * v_BCHW, noise_BCHW=sample.x_t + (1 - t_BCHW) * v_BCHW)


def differ(u: Callable[[Tensor], Tensor], t_B: Tensor, r_B: Tensor, *, difference: float) -> Tensor:
    """du/dt along a path, for MeanFlow's identity u = v - (t - r) du/dt; `u` gives the network's output at the path's
    state of each time.

    A difference over t +- `difference`, central inside and one-sided at t = 1 and at r; 0 where there is no room at all
    (t = r = 1). So no forward-mode derivative is needed, which ZeRO-3's hooks and fused attention lack.
    """
    upper_B, lower_B = (t_B + difference).clamp(max=1.0), torch.maximum(t_B - difference, r_B)
    change = u(upper_B) - u(lower_B)
    return change * broadcast_like(1 / (upper_B - lower_B).clamp(min=1e-9), change)
