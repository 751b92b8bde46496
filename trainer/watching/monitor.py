"""What the training loop watches besides the loss: loss by time, attention, waiting for data, efficiency, memory.

Everything is local until `take`, which adds up over the ranks when a line is due.
"""
# Shapes: B batch.

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from infra.log import get_logger
from infra.stolen import stolen_seconds
from model.probe import AttentionProbe, AttentionSeen
from trainer.objective import Losses
from trainer.planning.machines import Machine
from trainer.planning.plan import train_flops_of
from trainer.recipe import Recipe
from trainer.zero.group import Group

log = get_logger("monitor")
BINS = 8
LAST = 5  # attentions: the SD3 paper averages the last five blocks of its depth-24 model (figure 5)


class Monitor:
    """Figures since the last `take`."""

    def __init__(self, recipe: Recipe, group: Group, machine: Machine) -> None:
        self.group, self._machine = group, machine
        _, height, width = recipe.data.latent_shape
        # Exact, unlike the customary three forward passes: layers that read data need no gradient for their input.
        config, tokens = recipe.model, recipe.data.text_tokens
        exact = config.forward_flops(height, width, tokens) + config.backward_flops(height, width, tokens)
        self._flops = exact if recipe.lora.rank is None else train_flops_of(recipe)
        self._sums = torch.zeros(2, BINS, dtype=torch.float64)
        self._start()
        self.activations: int | None = None
        """Bytes that the first forward pass kept for its backward pass; None before it, or where blocks are recomputed
        or compiled."""
        self._eager = not recipe.parallel.compile
        if not self._eager and group.rank == 0:
            log.info("attention/max_logit and attention/entropy are not told: compiled blocks cannot be looked into")
        self._counts = self._eager and not recipe.parallel.checkpoint_blocks
        self._attention: list[AttentionSeen] = []
        self._figures: dict[str, float] = {}

    def _start(self) -> None:
        self._waited, self._averaged, self._images = 0.0, 0.0, 0
        self._since, self._cpu, self._stolen = time.monotonic(), time.process_time(), stolen_seconds()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around reading a batch."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextlib.contextmanager
    def averaging(self) -> Iterator[None]:
        """Around the EMA's update. Told on a CPU only: a GPU has not done the work yet when this ends."""
        start = time.monotonic()
        yield
        self._averaged += time.monotonic() - start

    @contextlib.contextmanager
    def counting(self, model: nn.Module) -> Iterator[None]:
        """Around the first forward pass, whose activations are counted as the plan counts them: each storage once,
        without the parameters."""
        if self.activations is not None or not self._counts:
            yield
            return
        found: dict[int, int] = {}
        kept: list[Tensor] = []  # so that no storage takes another's place

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            # Under stage 3 weights are gathered and let go all the time: theirs are the storages of this moment.
            if all(storage._cdata != p.untyped_storage()._cdata for p in model.parameters()):
                found[storage._cdata] = storage.nbytes()
                kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        self.activations = sum(found.values())

    @contextlib.contextmanager
    def looking(self, on: bool) -> Iterator[None]:
        """Around the forward pass whose attention is to be told, of one sample."""
        if not (on and self._eager):
            yield
            return
        with AttentionProbe(samples=1) as probe:
            yield
        self._attention += probe.seen[-LAST:]

    def add(self, losses: Losses) -> None:
        """Losses of one micro-batch, to the bins of their times."""
        bin_B = (losses.t_B.double() * BINS).long().clamp(0, BINS - 1).cpu()
        self._sums[0].index_add_(0, bin_B, losses.loss_B.detach().double().cpu())
        self._sums[1].index_add_(0, bin_B, torch.ones(len(bin_B), dtype=torch.float64))
        self._images += len(bin_B)
        for name, value_B in losses.figures.items():
            self._figures[name] = self._figures.get(name, 0.0) + value_B.double().sum().item()

    def take(self) -> dict[str, float]:
        """Figures of all ranks; starts anew. Collective."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        entropy = sum(seen.mean_entropy for seen in self._attention) / max(len(self._attention), 1)
        names = list(self._figures)  # the same on all ranks
        more = [self._figures[name] for name in names]
        summed = self.group.sum([*self._sums.flatten().tolist(), float(self._images), entropy, *more])
        logit = max((seen.max_logit for seen in self._attention), default=0.0)
        shares = [
            self._waited / seconds, self._averaged / seconds, (time.process_time() - self._cpu) / seconds,
            (stolen_seconds() - self._stolen) / seconds,
        ]  # fmt: skip
        largest = self.group.max([*shares, float(memory_bytes(self.group.device)), logit])
        rate = summed[2 * BINS] / seconds
        figures = {
            f"loss/t{(i + 0.5) / BINS:.4f}": summed[i] / summed[BINS + i] for i in range(BINS) if summed[BINS + i]
        }
        figures |= {
            "data_wait": largest[0],
            "mfu": self._flops * rate / (self._machine.flops * self.group.world),
            "memory_gib": largest[4] / 2**30,
        }
        if self.group.device.type == "cpu":
            # Cores in use, and those that the host of a virtual machine gave to others: seconds alone say little there.
            figures |= {"ema_share": largest[1], "cpu_cores": largest[2], "stolen_cores": largest[3]}
        if self._attention:
            figures |= {"attention/max_logit": largest[5], "attention/entropy": summed[2 * BINS + 1] / self.group.world}
        figures |= {name: value / summed[2 * BINS] for name, value in zip(names, summed[2 * BINS + 2 :])}
        self._sums.zero_()
        self._figures.clear()
        self._attention.clear()
        self._start()
        return figures


def memory_bytes(device: torch.device) -> int:
    """The most that this rank has held: of the GPU's memory, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
