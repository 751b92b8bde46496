"""Each rank's share of the parameters: flat fp32 master tensors, and which range of which parameter lies where in them.

The only file that touches DeepSpeed's private attributes (pinned: deepspeed>=0.19,<0.20; a test holds it), one class
per family of stages. Padding (a parameter that does not divide by the number of ranks) belongs to no segment.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Segment:
    """`numel` elements of parameter `name` from its flat position `start`, at `offset` of the master tensor."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class Flat:
    """One fp32 master tensor of this rank (what the optimizer steps on) and what is in it."""

    master: Tensor
    segments: tuple[Segment, ...]


class Partition(Protocol):
    """This rank's share of the parameters under some ZeRO stage."""

    flats: list[Flat]
    replicated: bool
    """True where every rank holds all parameters: whole tensors are then read from rank 0 alone."""

    def list_frozen(self) -> list[Flat]:
        """This rank's share of the parameters that do not train, in the precision of the forward pass; they have
        neither master nor moments. After writing to it call `show_master`."""

    def count_weight_bytes(self) -> int:
        """Bytes of the weights of the forward pass that this rank holds between two steps."""

    def list_gradients(self) -> list[Tensor]:
        """The tensors that hold this rank's gradients between the last backward pass and the step."""

    def show(self, tensors: Sequence[Tensor]) -> None:
        """Make forward passes use these values, one flat tensor per master. The masters do not change. Collective."""

    def show_master(self) -> None:
        """Make forward passes use the masters again, with the same bits as before. Collective."""

    def continue_step(self) -> None:
        """Say after a forward pass that the next one belongs to the same step (DPO makes two in a step)."""


class Stage3Partition:
    """Parameters, gradients and states sharded: each parameter is cut into `world_size` equal ranges."""

    replicated = False

    def __init__(self, engine: Any, names: dict[int, str]) -> None:
        self._engine, self._optimizer = engine, engine.optimizer
        # DeepSpeed's prefetch from NVMe asks for a tensor twice where two uses of it (forward, backward) lie ahead, and
        # then fails: without it a block's tensors are read when the block is reached.
        coordinator = self._optimizer.parameter_offload.get_param_coordinator()
        coordinator._PartitionedParameterCoordinator__prefetch_nvme = False
        self.flats = [
            Flat(master, self._segments(group, names))
            for group, master in zip(self._optimizer.fp16_groups, self._optimizer.fp32_partitioned_groups_flat)
        ]
        self._names = names

    def _segments(self, group: Sequence[Any], names: dict[int, str]) -> tuple[Segment, ...]:
        rank, found, offset = torch.distributed.get_rank(), [], 0
        for param in group:
            share = param.partition_numel()
            start = min(rank * share, param.ds_numel)
            numel = min(share, param.ds_numel - start)
            if numel:
                found.append(Segment(names[id(param)], tuple(param.ds_shape), start, numel, offset))
            offset += share
        return tuple(found)

    def list_frozen(self) -> list[Flat]:
        params = [param for param in self._engine.module.parameters() if not param.requires_grad]
        return [Flat(param.ds_tensor.data, self._segments([param], self._names)) for param in params]

    def count_weight_bytes(self) -> int:
        shards = [param.ds_tensor for group in self._optimizer.fp16_groups for param in group]
        shards += [flat.master for flat in self.list_frozen()]
        return sum(shard.numel() * shard.element_size() for shard in shards)

    def list_gradients(self) -> list[Tensor]:
        return [self._optimizer.grad_partitions_flat_buffer]

    def show(self, tensors: Sequence[Tensor]) -> None:
        # Gathered parameters outlive the forward pass (reuse distance, persistence threshold): without emptying that
        # cache the next forward pass would still compute with the old values.
        self._engine.empty_partition_cache()
        with torch.no_grad():
            for number, source in enumerate(tensors):
                target = self._optimizer.fp16_partitioned_groups_flat[number]
                if target is None:
                    self._swap_out(number, source)
                else:
                    target.copy_(source)
        self._optimizer.checkpoint_event_epilogue()  # gathers the persistent parameters again

    def _swap_out(self, number: int, source: Tensor) -> None:
        """Write values other than the master's to NVMe, in the way in which DeepSpeed does it after a step."""
        masters = self._optimizer.fp32_partitioned_groups_flat
        kept, masters[number] = masters[number], source
        try:
            self._optimizer._partitioned_params_swap_out(number)
        finally:
            masters[number] = kept

    def show_master(self) -> None:
        self.show([flat.master for flat in self.flats])

    def continue_step(self) -> None:
        # DeepSpeed prefetches by a trace of modules, which it begins anew at each forward pass: with two of them a step
        # no trace was ever whole, and nothing was prefetched.
        coordinator = self._optimizer.parameter_offload.get_param_coordinator()
        coordinator.reset_step = lambda: delattr(coordinator, "reset_step")


class Stage12Partition:
    """Gradients and states sharded, parameters whole: one flat range of all of them, in `world_size` pieces."""

    replicated = False

    def __init__(self, engine: Any, names: dict[int, str]) -> None:
        self._optimizer, self._model = engine.optimizer, engine.module
        masters = self._optimizer.single_partition_of_fp32_groups
        self.flats = [
            Flat(master, self._segments(group, names)) for group, master in zip(self._optimizer.bit16_groups, masters)
        ]

    def _segments(self, group: Sequence[Any], names: dict[int, str]) -> tuple[Segment, ...]:
        found = []
        for param in group:
            if param._hp_mapping is None:  # none of it lies on this rank
                continue
            inside, flat = param._hp_mapping.lp_fragment_address, param._hp_mapping.hp_fragment_address
            found.append(Segment(names[id(param)], tuple(param.shape), inside.start, inside.numel, flat.start))
        return tuple(sorted(found, key=lambda s: s.offset))

    def list_frozen(self) -> list[Flat]:
        return list_whole_flats(self._model, training=False)

    def count_weight_bytes(self) -> int:
        weights = [*self._optimizer.bit16_groups_flat, *(flat.master for flat in self.list_frozen())]
        return sum(flat.numel() * flat.element_size() for flat in weights)

    def list_gradients(self) -> list[Tensor]:
        kept = [grad for group in self._optimizer.averaged_gradients.values() for grad in group or ()]
        own = [param.grad for group in self._optimizer.bit16_groups for param in group]
        return [grad for grad in (*kept, *own) if grad is not None]

    def show(self, tensors: Sequence[Tensor]) -> None:
        from deepspeed.runtime.utils import all_gather_dp_groups

        o, rank = self._optimizer, torch.distributed.get_rank()
        for pieces, source in zip(o.parallel_partitioned_bit16_groups, tensors, strict=True):
            pieces[rank].data.copy_(source)
        all_gather_dp_groups(
            groups_flat=o.bit16_groups_flat,
            partitioned_param_groups=o.parallel_partitioned_bit16_groups,
            dp_process_group=o.real_dp_process_group,
            start_alignment_factor=o.nccl_start_alignment_factor,
            allgather_bucket_size=o.allgather_bucket_size,
        )

    def show_master(self) -> None:
        self.show([flat.master for flat in self.flats])

    def continue_step(self) -> None:
        pass


class Stage0Partition:
    """Nothing sharded, fp32 only: the parameters are the masters, so other values displace them for a while."""

    replicated = True

    def __init__(self, model: nn.Module) -> None:
        self.flats = list_whole_flats(model, training=True)
        self._displaced: list[Tensor] | None = None
        self._model = model

    def list_frozen(self) -> list[Flat]:
        return list_whole_flats(self._model, training=False)

    def count_weight_bytes(self) -> int:
        return sum(flat.master.numel() * flat.master.element_size() for flat in (*self.flats, *self.list_frozen()))

    def list_gradients(self) -> list[Tensor]:
        return [param.grad for param in self._model.parameters() if param.grad is not None]

    def show(self, tensors: Sequence[Tensor]) -> None:
        if self._displaced is None:
            self._displaced = [flat.master.clone() for flat in self.flats]
        for flat, source in zip(self.flats, tensors, strict=True):
            flat.master.copy_(source)

    def show_master(self) -> None:
        if self._displaced is not None:
            for flat, source in zip(self.flats, self._displaced):
                flat.master.copy_(source)
            self._displaced = None

    def continue_step(self) -> None:
        pass


def list_whole_flats(model: nn.Module, *, training: bool) -> list[Flat]:
    """Parameters that are not sharded, each by itself: those that train or those that do not."""
    return [
        Flat(param.data.view(-1), (Segment(name, tuple(param.shape), 0, param.numel(), 0),))
        for name, param in model.named_parameters() if param.requires_grad is training
    ]  # fmt: skip


def view_partition(engine: Any, model: nn.Module, *, stage: int) -> Partition:
    """The partition view of a DeepSpeed engine."""
    names = {id(param): name for name, param in model.named_parameters()}
    if stage == 3:
        return Stage3Partition(engine, names)
    return Stage12Partition(engine, names) if stage else Stage0Partition(model)


def get_shape(param: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter. Under stage 3 `param.shape` would be that of an empty tensor."""
    return tuple(getattr(param, "ds_shape", param.shape))


def get_adam(engine: Any, *, stage: int) -> torch.optim.Optimizer:
    """The Adam that was handed to DeepSpeed, which wraps it where it shards states."""
    return engine.optimizer.optimizer if stage else engine.optimizer


def has_overflowed(engine: Any) -> bool:
    """Did the last step find gradients that are not finite, and skip?"""
    return bool(getattr(engine.optimizer, "overflow", False))


def skip_overflow_scan(engine: Any) -> None:
    """Leave out DeepSpeed's search for infinite gradients, which stages 1 and 2 make under bf16. It calls a dozen small
    kernels for each gradient: on a GPU 95 of 115 ms of a step at depth 15. The gradient norm shows the same, and
    DeepSpeed skips a step whose norm is not finite."""
    engine.optimizer.check_overflow = lambda **options: None


@contextlib.contextmanager
def discard_gradients(engine: Any, *, stage: int, device: torch.device) -> Iterator[None]:
    """Inside the block a DeepSpeed step throws its gradients away. ZeRO optimizers drop gradients whose norm is
    invalid, so they are given an invalid norm. Without ZeRO (stage 0) the optimizer's step is replaced by nothing."""
    bad = torch.tensor(-1.0, device=device)
    name, stand_in = {
        0: ("step", lambda: None),
        1: ("scaled_global_norm", lambda: bad),
        2: ("scaled_global_norm", lambda: bad),
        3: ("_get_norm_groups", lambda: [bad]),
    }[stage]
    setattr(engine.optimizer, name, stand_in)
    try:
        yield
    finally:
        delattr(engine.optimizer, name)  # the class's own again


def leave_out_shared_memory(deepspeed: Any) -> None:
    """Stop DeepSpeed from compiling its shared-memory extension (a minute, once), which only inference uses."""
    deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)


def restart_beta_powers(adam: Any, args: Any, kwargs: Any) -> None:
    """Hook before each step of DeepSpeed's CPU Adam, so that a resumed run has the same bits. The kernel gets beta^n by
    one multiplication per step, but a resumed run begins with pow(beta, n), whose last bit can differ. A step number 0
    on one unused number makes the kernel call pow at every step (cpu_adam.h, IncrementStep)."""
    nothing = [torch.zeros(1) for _ in range(4)]
    beta_1, beta_2 = adam.param_groups[0]["betas"]
    adam.ds_opt_adam.adam_update(adam.opt_id, 0, 0.0, beta_1, beta_2, 1.0, 0.0, False, *nothing)
