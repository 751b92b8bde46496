"""A thin wrapper around DeepSpeed: forward, backward, step, and each rank's share of parameters and Adam states.

The recipe sets the ZeRO stage, 0 to 3. Under stage 3 every block of the backbone is a leaf module (DeepSpeed's word):
all parameters of a block are gathered at once.
"""

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.encoders.text import TextCond
from model.float32 import InFloat32
from model.lora import add_adapters, is_adapter, switch_off_adapters
from trainer.network import Losses
from trainer.recipe import Recipe
from trainer.zero.group import Group
from trainer.zero.optim import build_adamw
from trainer.zero.partition import (
    discard_gradients,
    get_adam,
    get_shape,
    has_overflowed,
    skip_overflow_scan,
    view_partition,
)

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepResult:
    """`applied` is False when DeepSpeed skipped the step because the gradient was not finite."""

    grad_norm: float
    applied: bool


class ZeroEngine:
    """The model of a recipe, spread over the ranks of `group`."""

    def __init__(
        self, recipe: Recipe, group: Group, *, accumulation: int = 1, passes: int = 1,
        build: Callable[[], nn.Module] | None = None,
    ) -> None:  # fmt: skip
        """`accumulation`: micro-batches of a step; `passes`: backward passes of each."""
        import deepspeed

        _quieten(deepspeed)
        self.recipe, self.group, self.stage = recipe, group, recipe.parallel.zero_stage
        self.accumulation, self._passes = accumulation, passes
        self.dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        config = make_deepspeed_config(recipe, group, accumulation=accumulation, passes=passes)
        make = build or (lambda: recipe.model.build(seed=recipe.seed))
        # Parameters are sharded as each layer is made: the whole model never lies on one rank.
        sharded = deepspeed.zero.Init(config_dict_or_path=config) if self.stage == 3 else contextlib.nullcontext()
        with sharded:
            model = make()
            if recipe.lora.rank is not None:
                add_adapters(model, rank=recipe.lora.rank, alpha=recipe.lora_alpha, seed=recipe.seed)
        model.checkpoint_blocks = recipe.parallel.checkpoint_blocks  # type: ignore[assignment]
        shapes = {n: get_shape(p) for n, p in model.named_parameters()}
        self.shapes = {n: shape for n, shape in shapes.items() if not is_adapter(n)}
        """Shapes of the network's own parameters by name, without adapters."""
        self.trained = {n: shapes[n] for n, p in model.named_parameters() if p.requires_grad}
        if recipe.parallel.compile:
            compile_blocks(model)
        if self.stage == 3:
            deepspeed.utils.set_z3_leaf_modules(model, list({type(block) for block in model.blocks}))  # type: ignore[union-attr]
        else:
            model = model.to(group.device, self.dtype)
        self.model = model
        optimizer = build_adamw([p for p in model.parameters() if p.requires_grad], recipe.optimizer)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        if self.stage in (1, 2) and not recipe.parallel.offload_optimizer:
            skip_overflow_scan(self._engine)
        self.partition = view_partition(self._engine, model, stage=self.stage)
        self._gradient_bytes = 0
        self._teacher: list[Tensor] = []
        self._within_step = False
        self._adam = get_adam(self._engine, stage=self.stage)

    # --- training

    def __call__(self, x_BCHW: Tensor, t: Tensor, text: TextCond, r: Tensor | None = None) -> Tensor:
        """The network's prediction, shaped as `x_BCHW`, in fp32 whatever precision the model computes in."""
        second = () if r is None else (r,)
        predicted_BCHW = self._engine(x_BCHW.to(self.dtype), t, text.to(dtype=self.dtype), *second)
        if self._within_step:
            self.partition.continue_step()
        return predicted_BCHW.float()

    def backpropagate(self, losses: Losses) -> None:
        """Add the gradients of this micro-batch's mean loss, in as many backward passes as it takes."""
        self.backward(losses.loss_B.mean())
        for loss in losses.earlier(1 / self.accumulation):
            self.backward(loss)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one backward pass; they are averaged over micro-batches and ranks.

        Each pass is one of DeepSpeed's micro-batches, by whose number it divides: a parameter that is used twice in one
        graph would be reduced too early under stage 3.
        """
        self._engine.backward(loss * self._passes if self._passes > 1 else loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # takes no step: this is how DeepSpeed counts micro-batches

    def step(self, lr: float) -> StepResult:
        """Clip the gradients and step, after the backward passes of all `accumulation` micro-batches. Collective."""
        for group in self._adam.param_groups:
            group["lr"] = lr
        before = self._engine.skipped_steps
        gradients = self.partition.list_gradients()
        if not self._gradient_bytes:
            storages = {g.untyped_storage()._cdata: g.untyped_storage().nbytes() for g in gradients}
            self._gradient_bytes = sum(storages.values())
        if self.stage == 0:
            # Without ZeRO DeepSpeed steps on any gradient and tells no norm. Gradients are the same on all ranks.
            value = float(torch.nn.utils.get_total_norm(gradients))
            if not math.isfinite(value):
                return self.discard()
            self._engine.step()
            return StepResult(value, True)
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        value = float(norm) if norm is not None else float("nan")
        skipped = self._engine.skipped_steps > before or has_overflowed(self._engine)
        return StepResult(value, not skipped)

    def discard(self) -> StepResult:
        """Throw away this step's gradients, instead of `step`. Weights and Adam's state do not change. Collective."""
        with discard_gradients(self._engine, stage=self.stage, device=self.group.device):
            self._engine.step()
        return StepResult(float("nan"), False)

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Inside the block forward passes keep no gradients; blocks may be nested."""
        training = self._engine.training
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train(training)

    @contextlib.contextmanager
    def without_gradients(self) -> Iterator[None]:
        """Inside the block forward passes keep no gradients; the next one belongs to the same training step."""
        self._within_step = True
        try:
            with self.inference():
                yield
        finally:
            self._within_step = False

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Inside the block a forward pass uses the frozen weights alone, without adapters or gradients: the reference
        of DPO."""
        with self.without_gradients(), switch_off_adapters(self.model):
            yield

    def keep_teacher(self) -> None:
        """Keep the weights of now as the frozen teacher's: this rank's share of them, in the precision of forward
        passes."""
        # DeepSpeed writes parameters to NVMe from masters, which are fp32.
        dtype = torch.float32 if self.recipe.parallel.offload_parameters == "nvme" else self.dtype
        self._teacher = [master.detach().to(dtype, copy=True) for master in self.masters]

    @contextlib.contextmanager
    def teacher(self) -> Iterator[None]:
        """Inside the block forward passes use the weights that `keep_teacher` kept, without gradients. The network is
        the same one, so a teacher takes no more memory than its shares. Collective."""
        with self.without_gradients(), self.use_weights(self._teacher):
            yield

    @contextlib.contextmanager
    def precise(self) -> Iterator[None]:
        """Inside the block a forward pass computes in fp32, without gradients: a part of a difference, as MeanFlow
        takes it. The weights are those of any forward pass, in bf16 under bf16."""
        dtype, self.dtype = self.dtype, torch.float32
        try:
            # Compiled blocks were traced for bf16: they run as they are written here.
            with self.without_gradients(), torch.compiler.set_stance("force_eager"), InFloat32():
                yield
        finally:
            self.dtype = dtype

    # --- this rank's share

    @property
    def masters(self) -> list[Tensor]:
        """This rank's flat fp32 tensors, which the optimizer changes. After writing to them call `publish`."""
        return [flat.master.data for flat in self.partition.flats]

    def publish(self) -> None:
        """Copy changed masters into the weights that forward passes use. Collective."""
        self.partition.show_master()

    @contextlib.contextmanager
    def use_weights(self, tensors: list[Tensor]) -> Iterator[None]:
        """Inside the block forward passes use other values, such as the EMA's: one flat tensor per master. The masters
        do not change. Collective."""
        self.partition.show(tensors)
        try:
            yield
        finally:
            self.partition.show_master()

    @property
    def adam_steps(self) -> int:
        """Optimizer steps taken so far."""
        state = self._adam.state.get(self._get_key(0), {})
        return int(state["step"]) if "step" in state else int(self._adam.param_groups[0].get("step", 0))

    def read_moments(self, name: str) -> list[Tensor]:
        """Adam's average `name` (exp_avg or exp_avg_sq), one flat tensor per master; zeros before the first step."""
        found = []
        for index, master in enumerate(self.masters):
            state = self._adam.state.get(self._get_key(index), {})
            found.append(state[name].view(-1) if name in state else torch.zeros_like(master))
        return found

    def set_moments(self, values: dict[str, list[Tensor]], *, steps: int) -> None:
        """Set Adam's averages (as `read_moments` gives them) and its number of steps, to continue from a checkpoint."""
        for index in range(len(self.masters)):
            key = self._get_key(index)
            state: dict[str, Any] = {name: values[name][index].view(key.shape) for name in MOMENTS}
            if self.recipe.optimizer.kernel == "torch":
                state["step"] = torch.tensor(float(steps), device=key.device)
            elif self.recipe.optimizer.kernel == "deepspeed_cpu":
                state["step"] = steps
            self._adam.state[key] = state
        if self.recipe.optimizer.kernel in ("apex", "deepspeed_fused"):
            for group in self._adam.param_groups:
                group["step"] = steps

    def _get_key(self, index: int) -> Any:
        """The tensor under which Adam keeps its state for this master."""
        if self.stage == 0:
            return self._adam.param_groups[0]["params"][index]
        return self.partition.flats[index].master

    # --- whole tensors

    def gather_whole(self, name: str, tensors: list[Tensor]) -> Tensor:
        """One full fp32 parameter on the CPU, put together from every rank's share of `tensors`. Collective."""
        shape = self.trained[name]
        full = torch.zeros(shape, dtype=torch.float32, device=self.group.device)
        if not self.partition.replicated or self.group.rank == 0:
            for flat, tensor in zip(self.partition.flats, tensors, strict=True):
                for s in flat.segments:
                    if s.name == name:
                        full.view(-1)[s.start : s.start + s.numel] = tensor[s.offset : s.offset + s.numel]
        return self.group.sum_(full).cpu()

    def load_whole(self, read: Callable[[str], Tensor]) -> None:
        """Fill the network from full tensors; `read(name)` is asked once per parameter that lies on this rank.
        Adapters stay as they are."""
        for flat in (*self.partition.flats, *self.partition.list_frozen()):
            for s in flat.segments:
                if is_adapter(s.name):
                    continue
                source = read(s.name).reshape(-1)[s.start : s.start + s.numel]
                flat.master.data[s.offset : s.offset + s.numel] = source.to(flat.master)
        self.publish()

    def count_bytes_by_category(self) -> dict[str, int]:
        """Bytes of this rank's tensors, measured, by the categories of the plan (gradients: those of the first
        step)."""
        moments = sum(m.numel() * m.element_size() for name in MOMENTS for m in self.read_moments(name))
        masters = sum(m.numel() * m.element_size() for m in self.masters) if self.stage else 0
        teacher = sum(t.numel() * t.element_size() for t in self._teacher)
        return {
            "weights": self.partition.count_weight_bytes(),
            "masters": masters,
            "moments": moments,
            "gradients": self._gradient_bytes,
        } | ({"teacher": teacher} if teacher else {})

    def describe(self) -> dict[str, int]:
        """Numbers of elements: `local`, in this rank's masters; `parameters`, in the whole network."""
        total = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        return {"local": sum(s.numel for f in self.partition.flats for s in f.segments), "parameters": total}


def make_deepspeed_config(recipe: Recipe, group: Group, *, accumulation: int, passes: int = 1) -> dict[str, Any]:
    """DeepSpeed's JSON for a recipe. What is not named here keeps DeepSpeed's default."""
    p = recipe.parallel
    # Gloo has no streams: overlapping would only add copies.
    overlap = group.device.type == "cuda"
    config: dict[str, Any] = {
        "train_batch_size": recipe.global_batch * passes,
        "gradient_accumulation_steps": accumulation * passes,
        "gradient_clipping": recipe.optimizer.clip_norm or 0.0,
        "steps_per_print": 2**62,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": p.zero_stage,
            "overlap_comm": overlap,
            "contiguous_gradients": overlap,
            "reduce_bucket_size": p.reduce_bucket,
            "allgather_bucket_size": p.reduce_bucket,
        },
    }
    if p.zero_stage == 3:
        config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": p.persistence_threshold,
            "stage3_prefetch_bucket_size": p.prefetch,
            "stage3_max_live_parameters": p.max_live,
            "stage3_max_reuse_distance": p.max_live,
            # DeepSpeed's own linear keeps no gathered weight for the backward pass. Where they all stay gathered anyway
            # torch's is faster, and torch.compile sees through it.
            "memory_efficient_linear": recipe.model.count_parameters() > p.max_live,
            "zero_hpz_partition_size": p.hpz,
            "zero_quantized_weights": p.quantized_weights,
            "zero_quantized_gradients": p.quantized_gradients,
        }
        if p.offload_parameters != "no":
            pin = group.device.type == "cuda"
            where: dict[str, Any] = {"device": p.offload_parameters, "nvme_path": p.nvme_path, "pin_memory": pin}
            if p.offload_parameters == "nvme":
                where |= {"max_in_cpu": 0, **size_swap_buffers(recipe, group.world_size)}
            config["zero_optimization"]["offload_param"] = {k: v for k, v in where.items() if v is not None}
    if p.offload_optimizer:
        # The optimizer states stay in the host's memory: checkpoints and EMA read them there.
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": group.device.type == "cuda"}
        config["zero_force_ds_cpu_optimizer"] = recipe.optimizer.kernel == "deepspeed_cpu"
    if recipe.precision == "bf16":
        config["bf16"] = {"enabled": True}
        if p.fp32_reduce:
            config["communication_data_type"] = "fp32"
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def size_swap_buffers(recipe: Recipe, world_size: int) -> dict[str, int]:
    """Number and size (in elements) of the buffers through which DeepSpeed reads parameters from NVMe, one per tensor.
    It asks for all tensors of a block at once, and for those of the next block while the first one computes. Its
    default of five buffers is too few for any block."""
    with torch.device("meta"):
        model: Any = recipe.model.build()
    sizes = [parameter.numel() for parameter in model.parameters()]
    blocks = [len(list(block.parameters())) for block in model.blocks]
    count = len(sizes) - sum(blocks) + 2 * max(blocks)
    return {"buffer_count": count, "buffer_size": -(-max(sizes) // world_size)}


def compile_blocks(model: nn.Module) -> None:
    """torch.compile each block's forward, inside DeepSpeed's hooks, which gather its parameters first.

    Shapes are static, so each bucket of latents costs one graph per class of block; more than 64 are an error.
    """
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for block in model.blocks:  # type: ignore[union-attr]
        block.forward = torch.compile(block.forward, dynamic=False)  # type: ignore[method-assign]


def _quieten(deepspeed: Any) -> None:
    """Silence DeepSpeed's log, which prints every setting at start and hides the loss."""
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # torch 2.14 renamed the collectives that DeepSpeed 0.19 calls.
    warnings.filterwarnings("ignore", message=".*is deprecated.*", category=FutureWarning)
