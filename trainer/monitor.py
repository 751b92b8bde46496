"""What the training loop watches besides the loss: loss by time, attention, waiting for data, efficiency, memory.

Everything is local until `take`, which adds up over the ranks when a line is due.
"""
# Shapes: B batch, N image tokens, S all tokens, H heads, K head width.

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from model.attention import QKV
from trainer.machines import Machine
from trainer.objective import Losses
from trainer.recipe import Recipe
from trainer.zero.group import Group

BINS = 8
LAST_BLOCKS = 5  # the SD3 paper averages the last five blocks of its depth-24 model (figure 5)


class Monitor:
    """Figures since the last `take`."""

    def __init__(self, recipe: Recipe, model: nn.Module, group: Group, machine: Machine) -> None:
        self.group, self._machine = group, machine
        _, height, width = recipe.data.latent_shape
        # Exact, unlike the customary three forward passes: layers that read data need no gradient for their input.
        config, tokens = recipe.model, recipe.data.text_tokens
        self._flops = config.forward_flops(height, width, tokens) + config.backward_flops(height, width, tokens)
        self._sums = torch.zeros(2, BINS, dtype=torch.float64)
        self._waited, self._since, self._images = 0.0, time.monotonic(), 0
        # Hooks would be traced into compiled blocks.
        self.attention = None if recipe.parallel.compile else AttentionWatch(model)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around reading a batch."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextlib.contextmanager
    def looking(self, on: bool) -> Iterator[None]:
        """Around the forward pass whose attention is to be told."""
        if self.attention is not None:
            self.attention.on = on
        yield
        if self.attention is not None:
            self.attention.on = False

    def add(self, losses: Losses) -> None:
        """Losses of one micro-batch, to the bins of their times."""
        bin_B = (losses.t_B.double() * BINS).long().clamp(0, BINS - 1).cpu()
        self._sums[0].index_add_(0, bin_B, losses.loss_B.detach().double().cpu())
        self._sums[1].index_add_(0, bin_B, torch.ones(len(bin_B), dtype=torch.float64))
        self._images += len(bin_B)

    def take(self) -> dict[str, float]:
        """Figures of all ranks; starts anew. Collective."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        attention = self.attention.take() if self.attention is not None else None
        told = [*self._sums.flatten().tolist(), float(self._images)]
        summed = self.group.sum([*told, attention.entropy if attention else 0.0])
        largest = self.group.max(
            [self._waited / seconds, float(memory_bytes(self.group.device)), attention.largest if attention else 0.0]
        )
        rate = summed[2 * BINS] / seconds
        figures = {
            f"loss/t{(i + 0.5) / BINS:.4f}": summed[i] / summed[BINS + i] for i in range(BINS) if summed[BINS + i]
        }
        figures |= {
            "data_wait": largest[0],
            "mfu": self._flops * rate / (self._machine.flops * self.group.world),
            "memory_gib": largest[1] / 2**30,
        }
        if attention is not None:
            figures |= {"attention/max_logit": largest[2], "attention/entropy": summed[2 * BINS + 1] / self.group.world}
        self._sums.zero_()
        self._waited, self._since, self._images = 0.0, time.monotonic(), 0
        return figures


class Attention:
    """Of the last blocks: the largest scaled logit, and the mean entropy of a query's weights in nats."""

    def __init__(self) -> None:
        self.largest, self._entropies = 0.0, [0.0, 0.0]

    @property
    def entropy(self) -> float:
        return self._entropies[0] / max(self._entropies[1], 1.0)

    def add(self, q_NHK: Tensor, k_SHK: Tensor, allowed_S: Tensor | None) -> None:
        for head in range(q_NHK.shape[1]):  # one at a time: at 1024 px a matrix has 18 million entries
            logits_NS = q_NHK[:, head].float() @ k_SHK[:, head].float().T / q_NHK.shape[-1] ** 0.5
            if allowed_S is not None:
                logits_NS = logits_NS[:, allowed_S]
            log_p_NS = logits_NS.log_softmax(-1)
            self._entropies[0] += -(log_p_NS.exp() * log_p_NS).sum().item()
            self._entropies[1] += len(log_p_NS)
            self.largest = max(self.largest, logits_NS.max().item())


class AttentionWatch:
    """Reads queries and keys of one sample where the blocks make them. Silent unless `on`."""

    def __init__(self, model: nn.Module) -> None:
        self.on, self._found = False, Attention()
        blocks: Any = model.blocks
        for block in list(blocks)[-LAST_BLOCKS:]:
            projections = [module for name, module in block.named_modules() if name in JOINED]
            if projections:
                self._watch(block, projections)

    def take(self) -> Attention | None:
        """What was found since the last time; None when nothing was."""
        found, self._found = self._found, Attention()
        return found if found._entropies[1] else None

    def _watch(self, block: nn.Module, projections: list[nn.Module]) -> None:
        seen: list[QKV] = []

        def keep(module: nn.Module, given: Any, made: QKV) -> None:
            if self.on:
                seen.append(QKV(*(x[0].detach() for x in made)))

        def finish(module: nn.Module, given: tuple[Any, ...], made: Any) -> None:
            if self.on and len(seen) == len(projections):
                q, k = (torch.cat([getattr(x, name) for x in seen]) for name in ("q", "k"))
                image = seen[0].q.shape[0] if len(seen) > 1 else len(q)
                biases = [x for x in given if isinstance(x, Tensor) and x.dim() == 4 and x.shape[-1] == len(k)]
                allowed_S = biases[0][0, 0, 0] == 0 if biases else None
                self._found.add(q[:image], k, allowed_S)
            seen.clear()

        for projection in projections:
            projection.register_forward_hook(keep)
        block.register_forward_hook(finish)


# Projections whose queries and keys meet in one attention, in the order in which the block joins them.
JOINED = ("image.qkv", "text.qkv", "clip.qkv", "t5.qkv", "stream.qkv")


def memory_bytes(device: torch.device) -> int:
    """The most that this rank has held: of the GPU's memory, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
