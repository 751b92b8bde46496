"""What a run is: one frozen dataclass. Its hash keys every result; paths, world size and logging are left out of it.

Everything is counted in images. A named recipe (trainer/recipes.py) plus typed overrides gives the resolved recipe,
which is written to RUN/recipe.json.
"""

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, getitem
from typing import Annotated, Any, Literal

import tyro
from pydantic import PlainValidator

from infra.codec import from_json, to_json
from infra.device import Precision
from infra.errors import UserError
from model.backbone import read_config
from model.backbones.trunk import TokenConfig
from model.diffusion.flow import get_formulation
from model.diffusion.validation import ValSettings
from model.lora import count_adapter_parameters

# What decides the weights that come out. The rest (name, parallel, validation, logging) does not change them.
HASHED = (
    "model", "formulation", "shift", "images", "global_batch", "seed", "precision", "optimizer", "schedule", "ema",
    "data", "init_weights", "guard", "objective", "dpo", "lora", "student",
)  # fmt: skip
# Fields that are younger than the first stored hashes: each is hashed only where it differs from its default, so that
# recipes of before keep their hash. A new field goes here.
YOUNGER = (
    "data.caption_weights", "student.steps", "student.states", "student.perceptual", "student.perceptual_weight",
    "student.latent_weight", "student.equal_times", "student.to_zero", "student.difference", "student.guidance",
    "student.teacher_steps", "student",
)  # fmt: skip


def _read_model(fields: Mapping[str, Any]) -> TokenConfig:
    """What `Recipe.to_json` wrote of the network: its fields, and its name where it is not `mmdit`."""
    rest = {key: value for key, value in fields.items() if key != "backbone"}
    return read_config(fields.get("backbone", "mmdit"), rest)


@dataclass(frozen=True)
class Optimizer:
    """AdamW. `torch`: torch's fused kernel; `apex`: NVIDIA's FusedAdam, an error where it is not installed;
    `deepspeed_cpu`, `deepspeed_fused`: DeepSpeed's own, compiled at first use (the first for offload_optimizer)."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    kernel: Literal["torch", "apex", "deepspeed_cpu", "deepspeed_fused"] = "torch"


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up (at most a tenth of the run), constant rate, then a cooldown over the last part of the run.

    A constant rate plus cooldown lets one run serve several horizons: branch off before the cooldown.
    """

    warmup_images: int = 0
    cooldown: float = 0.0
    """Share of the run, at its end, over which the rate falls to `final`."""
    shape: Literal["linear", "cosine", "sqrt"] = "linear"
    final: float = 0.0
    """Rate at the very end, as a share of the full rate."""


@dataclass(frozen=True)
class EMA:
    """`power:0.10` is the power-function profile of that relative width (EDM2, arXiv 2312.02696, eq. 123-127);
    `decay:0.99@102400` multiplies by 0.99 every 102,400 images (`decay:0.999` at every step).

    The first profile is the one that is validated and exported as weights/ema.safetensors.
    """

    profiles: tuple[str, ...] = ("power:0.10",)


@dataclass(frozen=True)
class Data:
    """Which data, and how captions are drawn. The fingerprint is filled in when the data set is opened."""

    resolution: int = 256
    latent_shape: tuple[int, int, int] = (16, 32, 32)
    """Channels, height, width of the square bucket's latents: what plans are computed with."""
    text_tokens: int = 154
    original_captions: float = 0.5
    """Share of original captions; the rest are synthetic ones, equally often where a dataset has several."""
    caption_weights: tuple[str, ...] = ()
    """How often each caption is drawn, by its name in the dataset, e.g. original=2 synthetic=1 short=1; instead of
    original_captions."""
    encoder_dropout: float = 0.464
    """Each text encoder is zeroed independently with this probability (SD3, App. B.3)."""
    fingerprint: Annotated[str | None, tyro.conf.Suppress] = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Height and width of the latents, tokens of the text: what FLOPs are counted for."""
        return (*self.latent_shape[1:], self.text_tokens)


@dataclass(frozen=True)
class Parallel:
    """How the work is spread: changes speed and memory, not the result (beyond the order of float sums)."""

    zero_stage: Literal[0, 1, 2, 3] = 3
    micro_batch: int | None = None
    """Images per rank and forward pass; None: the rank's whole share of the global batch."""
    persistence_threshold: int = 100_000
    """Parameters smaller than this are never sharded under stage 3; 0 shards everything."""
    reduce_bucket: int = 50_000_000
    prefetch: int = 50_000_000
    max_live: int = 1_000_000_000
    """Elements that may stay gathered between uses; 0 gathers every block once forward and once backward."""
    fp32_reduce: bool = True
    """Reduce and accumulate gradients in fp32 although the model computes in bf16."""
    checkpoint_blocks: bool = False
    """Recompute each block's activations in the backward pass instead of keeping them."""
    compile: bool = False
    """torch.compile each block, one graph per bucket of latents."""
    offload_optimizer: bool = False
    """Keep masters and Adam's moments in the host's memory and step there (stages 1 to 3)."""
    offload_parameters: Literal["no", "cpu", "nvme"] = "no"
    """Keep the shards of the parameters elsewhere between uses (stage 3)."""
    nvme_path: str | None = None
    """Folder on a fast local disk, for offload_parameters nvme."""
    hpz: int = 1
    """Ranks of a node that hold a second copy of the shards, so that the backward pass gathers inside the node
    (ZeRO++ hpZ, stage 3); 1: off."""
    quantized_weights: bool = False
    """Gather parameters as int8 (ZeRO++ qwZ, CUDA only); changes the numbers a little."""
    quantized_gradients: bool = False
    """Reduce gradients as int4 (ZeRO++ qgZ, CUDA only); changes the numbers."""


@dataclass(frozen=True)
class Guard:
    """What happens to a batch whose loss or gradient cannot be right: it is skipped, and the run goes back to its last
    checkpoint."""

    max_skips: int = 3
    """Batches that a run may skip; one more ends it."""
    spike: float | None = 12.0
    """A loss this many robust deviations above the median of the last 128 steps, and above twice their largest (8 times
    in batches of 16), is a spike; None: only non-finite values count."""


@dataclass(frozen=True)
class DPO:
    """Diffusion-DPO (Wallace et al., arXiv 2311.12908) on preference pairs: objective dpo, counted in pairs."""

    beta: float = 2000.0
    """How strongly the model is held to the reference; SD3 does not state its value."""


@dataclass(frozen=True)
class Student:
    """A student of a teacher: objectives reflow, distil, meanflow and perflow."""

    loss: Literal["l2", "huber"] = "l2"
    """Of velocities, or of latents where distil rolls out."""
    huber: float = 0.00054
    """The constant of huber is this times the numbers of a latent, as in the code of 2-rectified flow++."""
    any_density: bool = False
    """Allow a density of times that is made for pretraining (lognorm, mode, cosmap)."""
    any_teacher: bool = False
    """Allow couplings of another teacher than --init-from, and other training of a student of few steps."""
    steps: int = 1
    """distil: steps of the student's grid; perflow: its windows, each of which the student crosses in one step."""
    states: Literal["line", "rollout"] = "line"
    """distil: the student is asked at points of the pair's straight line, or takes all its steps from the noise, and
    the gradient goes back through them."""
    perceptual: str | None = None
    """Compare decoded pictures as well (reflow, distil): features:FOLDER of a vision model, e.g. features:world:clip,
    or lpips-vgg:FILE."""
    perceptual_weight: float = 1.0
    latent_weight: float = 1.0
    """Of the loss in latents beside a perceptual one; 0: that one alone."""
    equal_times: float = 0.5
    """meanflow: share of samples with r = t."""
    to_zero: float = 0.25
    """meanflow: share of samples with r = 0."""
    difference: float = 0.005
    """meanflow: half the step in t over which du/dt is taken."""
    guidance: float | None = None
    """Guidance of the frozen teacher, the weights of --init-from, where it is asked in training, on ordinary data
    (perflow, meanflow); 1: none, the student may be guided. None: couplings teach (reflow, distil, meanflow)."""
    teacher_steps: int = 8
    """perflow: Euler steps of the teacher through a window."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on every linear layer; the weights of --init-from are frozen under them."""

    rank: int | None = None
    """None: no adapters, all weights train."""
    alpha: float | None = None
    """Adapters are scaled by alpha / rank; None: by 1."""


@dataclass(frozen=True)
class Validation(ValSettings):
    """Loss of the EMA weights on the val split, with noise fixed per sample."""

    every: int | Literal["auto"] | None = "auto"
    """auto: eight times a run; None: never."""


@dataclass(frozen=True)
class Logging:
    """Cadences in images; auto: a hundred log lines and four checkpoints a run."""

    log_every: int | Literal["auto"] = "auto"
    save_every: int | Literal["auto"] = "auto"
    save_at: tuple[int, ...] = ()
    """Further points, in images, at which a checkpoint is taken: where other runs will branch off."""
    keep: int = 3
    """Checkpoints kept; exported weights are always kept."""
    samples: int = 0
    """Captions of the val split that pictures are drawn for at each checkpoint (RUN/samples/)."""
    wandb: str | None = None
    """Weights & Biases project that also gets the curves."""
    mlflow: str | None = None
    """MLflow tracking URI that also gets the curves."""
    stall_s: float = 600.0
    """Seconds without progress after which every rank's stack traces are written to RUN/logs/."""


@dataclass(frozen=True)
class Recipe:
    """Complete description of a run. `hash` is the identity of its results."""

    name: Annotated[str, tyro.conf.Suppress]
    model: Annotated[TokenConfig, PlainValidator(_read_model)]
    images: int
    """Images to train on, counted with repetition."""
    global_batch: int
    formulation: str = "rf/lognorm(0.00,1.00)"
    shift: float = 1.0
    """Resolution shift of the timesteps (SD3 eq. 23): 1 at 256 px, 3 at 1024 px."""
    seed: int = 0
    precision: Precision = "auto"
    """auto: bf16 where this machine multiplies it faster than fp32; resolved when a run starts, and kept by it."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    ema: EMA = field(default_factory=EMA)
    data: Data = field(default_factory=Data)
    parallel: Parallel = field(default_factory=Parallel)
    validation: Validation = field(default_factory=Validation)
    logging: Logging = field(default_factory=Logging)
    guard: Guard = field(default_factory=Guard)
    objective: str = "pretrain"
    """pretrain: the formulation's loss; dpo: preference pairs, which images, global_batch and micro_batch then count;
    reflow, distil, meanflow: a teacher's couplings; perflow, meanflow: a frozen teacher (trainer/objective.py)."""
    dpo: DPO = field(default_factory=DPO)
    lora: LoRA = field(default_factory=LoRA)
    student: Student = field(default_factory=Student)
    init_weights: Annotated[str | None, tyro.conf.Suppress] = None
    """sha256 of the weights the run started from (set by --init-from)."""

    @property
    def hash(self) -> str:
        """16 hex digits over everything that decides the weights, the data's fingerprint included. A recipe has none
        before its precision is resolved."""
        if self.precision == "auto":
            raise ValueError(f"recipe {self.name} has no identity yet: its precision is not resolved")
        return hashlib.sha256(json.dumps(_collect_hashed(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def steps(self) -> int:
        return -(-self.images // self.global_batch)

    @property
    def trained_parameters(self) -> int:
        """Parameters with masters, moments, gradients and EMA: all of the network's, or the adapters' alone."""
        rank = self.lora.rank
        return self.model.count_parameters() if rank is None else count_adapter_parameters(self.model, rank)

    @property
    def lora_alpha(self) -> float:
        """The alpha of the adapters; their outputs are scaled by alpha / rank."""
        return float(self.lora.alpha or self.lora.rank or 1)

    @property
    def lowest_stage(self) -> int:
        """ZeRO stages below it cannot do what precision and fp32_reduce ask for: bf16 needs masters (stage 1), and for
        fp32 sums under stage 1 DeepSpeed has an optimizer of its own, whose shares zero/partition.py does not read."""
        return (2 if self.parallel.fp32_reduce else 1) if self.precision == "bf16" else 0

    @property
    def num_saves(self) -> int:
        """Checkpoints that a run takes; each leaves a file of EMA weights."""
        return -(-self.images // (self.get_cadence("save") or self.images))

    def get_cadence(self, what: Literal["log", "validate", "save"]) -> int | None:
        """Images between two log lines, validations or checkpoints; None: never."""
        cadences = {"log": self.logging.log_every, "validate": self.validation.every, "save": self.logging.save_every}
        every, times_a_run = cadences[what], {"log": 100, "validate": 8, "save": 4}[what]
        return max(self.global_batch, self.images // times_a_run) if every == "auto" else every

    def is_due(self, what: Literal["log", "validate", "save"], images_seen: int) -> bool:
        """Does the step that ends at `images_seen` cross a multiple of the cadence? (It need not divide by the
        batch.)"""
        every, before = self.get_cadence(what), images_seen - self.global_batch
        if what == "save" and any(before < at <= images_seen for at in self.logging.save_at):
            return True
        return every is not None and images_seen // every > before // every

    def to_json(self) -> dict[str, Any]:
        backbone = {} if self.model.name == "mmdit" else {"backbone": self.model.name}
        return to_json(self) | {"model": self.model.to_json() | backbone}

    @staticmethod
    def from_json(data: Any, *, where: str = "recipe") -> "Recipe":
        """The recipe in JSON text, or in what `json.loads` made of it. UserError for a field that is missing, unknown
        or of another type."""
        return from_json(Recipe, data, where=where)

    def compute_lr(self, images_seen: int) -> float:
        """Learning rate of the step that ends at `images_seen`."""
        s, rate = self.schedule, self.optimizer.lr
        warmup = min(s.warmup_images, self.images // 10)
        if images_seen < warmup:
            return rate * images_seen / warmup
        start = self.images * (1 - s.cooldown)
        if s.cooldown == 0 or images_seen <= start:
            return rate
        # From 1 at the start of the cooldown to 0 at its end.
        left = 1 - min((images_seen - start) / (self.images - start), 1.0)
        falls = {"linear": left, "cosine": _fall_as_cosine(left), "sqrt": 1 - (1 - left) ** 0.5}
        return rate * (s.final + (1 - s.final) * falls[s.shape])


def _fall_as_cosine(left: float) -> float:
    return 0.5 * (1 - math.cos(math.pi * left))


def count_micro_batches(recipe: Recipe, world_size: int) -> int:
    """Forward passes per rank and step; UserError where the batch cannot be shared so."""
    share, rest = divmod(recipe.global_batch, world_size)
    if rest:
        raise UserError(
            f"recipe {recipe.name}: global_batch {recipe.global_batch} does not divide by {world_size} ranks: use "
            f"another number of ranks or --global-batch {recipe.global_batch // world_size * world_size or world_size}"
        )
    micro = recipe.parallel.micro_batch or share
    if share % micro:
        raise UserError(
            f"recipe {recipe.name}: micro_batch {micro} does not divide the {share} images of a rank: "
            f"use a divisor of {share}"
        )
    return share // micro


def read_caption_weights(words: Sequence[str]) -> dict[str, float]:
    """`original=2 short=1` as weights by name; UserError for anything else."""
    found: dict[str, float] = {}
    for word in words:
        name, equals, number = word.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not equals or not name or name in found or not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"--data.caption-weights {word}: expected NAME=WEIGHT, each name once, e.g. original=1")
        found[name] = weight
    if found and not sum(found.values()) > 0:
        raise UserError("--data.caption-weights: all are 0, so no caption would be drawn")
    return found


def find_differences(old: Recipe, new: Recipe) -> list[str]:
    """Dotted names of hashed fields that differ: `['optimizer.lr: 0.0001 -> 0.001']`."""
    found: list[str] = []

    def walk(a: Any, b: Any, path: str) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted(a.keys() | b.keys()):
                walk(a.get(key), b.get(key), f"{path}.{key}" if path else key)
        elif a != b:
            found.append(f"{path}: {a} -> {b}")

    walk(_collect_hashed(old), _collect_hashed(new), "")
    return found


def _collect_hashed(recipe: Recipe) -> dict[str, Any]:
    """What the identity of a run is made of."""
    fields = recipe.to_json()
    with contextlib.suppress(UserError):  # of several ways to write it; an unknown one is refused where it is used
        fields["formulation"] = get_formulation(recipe.formulation).name
    default = Recipe(name="", model=recipe.model, images=0, global_batch=0)
    for path in YOUNGER:
        if attrgetter(path)(recipe) == attrgetter(path)(default):
            *parents, last = path.split(".")
            del functools.reduce(getitem, parents, fields)[last]
    return {name: fields[name] for name in HASHED if name in fields}
