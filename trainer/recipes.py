"""The recipes by name. One dial, depth, makes a ladder: width 64*depth, heads = depth, everything else follows."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from infra.errors import UserError, nearest
from model.backbone import BACKBONES
from model.backbones.mmdit import MMDiTConfig
from trainer.paper import DEPTHS, captions, distil, dpo, high_resolution, meanflow, perflow, pretrain_256, reflow, study
from trainer.recipe import (
    DPO,
    EMA,
    Data,
    Guard,
    Logging,
    LoRA,
    Optimizer,
    Parallel,
    Recipe,
    Schedule,
    Student,
    Validation,
)

WORLD_DEPTHS = (1, 2, 3, 4, 5, 6)


def world(depth: int) -> Recipe:
    """The miniature world: 64x64 scenes as 64 image tokens with 32 text tokens, every parameter sharded.

    Command: deepspeed --num_gpus 2 --module trainer train world-d4 --data URI --out RUN
    Hardware and time: two CPU cores; depth 4 takes 48 minutes of two idle ones with AMX (115,200 images at 40 a second,
    below). The rate falls with the width as 1/sqrt(width): our choice.
    At depth 3 (rate 3.5e-3), 150 seconds on one core with the cooldown inside: validation loss 0.670 with 1.15e-3
    (5,936 images), 0.597 with 2.3e-3 (6,048), 0.553 with 4.6e-3 (6,720); 9e-3 is behind at equal images. Batch 16, for
    short runs live by their number of steps: after 1,700 images depth 3 stood at a training loss of 1.0 with it, 1.2
    with batch 32, 1.5 with 64. Encoder dropout leaves 10 % of the samples without any text, as the paper's 46.4 % does
    for three encoders; here there are two.
    Expected: infra/docs/runs/world_long/report.md (57,600 images a depth, in fp32), world_d4/report.md (depth 4,
    340,000 images in batches of 32). Two idle cores with AMX, depth 4: 16 images/s in fp32, 40 in bf16, 61 in batches
    of 32, 70 with blocks compiled too (a minute at the start), which long runs take.
    """
    return Recipe(
        name=f"world-d{depth}",
        model=MMDiTConfig(depth=depth, in_channels=8, context_width=384, pooled_width=128),
        images=115_200,
        global_batch=16,
        optimizer=Optimizer(lr=3e-3 * (4 / depth) ** 0.5, betas=(0.9, 0.99)),
        schedule=Schedule(warmup_images=1_600, cooldown=0.3),
        ema=EMA(profiles=("power:0.10",)),
        data=Data(resolution=64, latent_shape=(8, 16, 16), text_tokens=32, encoder_dropout=0.316),
        parallel=Parallel(persistence_threshold=0, reduce_bucket=4_000_000, prefetch=4_000_000),
        validation=Validation(samples=128, batch=32),
        logging=Logging(samples=8),
    )


def world_backbone(backbone: str, depth: int) -> Recipe:
    """The backbone ablation (paper, figure 4) in the miniature world: all else as `world-dN`.

    Command: deepspeed --num_gpus 2 --module trainer train world-uvit-d2 --data URI --out RUN
    Hardware and time: two CPU cores, about the 48 minutes of `world-d4` at depth 4, less at 2 and 3.
    Expected: validation loss in the paper's order, dit > uvit > cross_dit > mmdit >= mmdit3; at depth 2 after 6,400
    images another one (infra/docs/runs/world_ablations).
    """
    base = world(depth)
    model = BACKBONES[backbone].for_text(
        base.data.text_tokens, depth=depth, in_channels=8, context_width=384, pooled_width=128
    )
    return replace(base, name=f"world-{backbone}-d{depth}", model=model)


def world_captions(original: float, depth: int) -> Recipe:
    """The caption ablation (paper, table 4) in the miniature world: original captions alone, or half synthetic ones.

    Command: deepspeed --num_gpus 2 --module trainer train world-captions-original-d3 --data URI --out RUN
    Hardware and time: two CPU cores, the 48 minutes of `world-d4` at depth 4, less at 2 and 3.
    Expected: the mixture scores better on world_geneval; at depth 2 after 6,400 images seeds differ by more than the
    two do (infra/docs/runs/world_ablations).
    """
    base = world(depth)
    name = "original" if original == 1 else "mixed"
    data = replace(base.data, original_captions=original)
    return replace(base, name=f"world-captions-{name}-d{depth}", data=data)


def world_dpo(depth: int) -> Recipe:
    """Diffusion-DPO in the miniature world: adapters on the weights of `world-dN`, from pairs of their own pictures
    that a judge has ranked.

    Command: python -m eval pairs --weights RUNS/world-d4/weights/ema.safetensors --out PAIRS
        deepspeed --num_gpus 2 --module trainer train world-dpo-d4 --data PAIRS --out RUNS/world-dpo-d4
        --init-from RUNS/world-d4/weights/ema.safetensors
    Hardware and time: two CPU cores, 2 minutes of training at depth 4 as planned; drawing, ranking, training on half as
    many pairs and scoring took 30 minutes of two busy ones.
    Expected: judges that did not rank the pairs score it above `world-dN`; not run yet at this length (3,200 pairs
    moved no score beyond its interval, infra/docs/runs/world_dpo). From the paper: all linear layers. Our choice: the
    rest; rank 16 is about the share of the width that 128 is in the paper's 2B model.
    """
    base, batch = world(depth), 16
    return replace(
        base,
        name=f"world-dpo-d{depth}",
        images=400 * batch,
        global_batch=batch,
        objective="dpo",
        dpo=DPO(beta=2000.0),
        lora=LoRA(rank=16),
        optimizer=Optimizer(lr=1e-4),
        schedule=Schedule(warmup_images=40 * batch),
        data=replace(base.data, encoder_dropout=0.0),
        guard=Guard(spike=None),
    )


def world_reflow(depth: int) -> Recipe:
    """One reflow in the miniature world: the weights of `world-dN` on couplings of their own.

    Command: python -m data_pipeline couple --teacher RUNS/world-d4/weights/ema.safetensors --prompts DATA
        --count 20000 --out COUPLINGS
        deepspeed --num_gpus 2 --module trainer train world-reflow-d4 --data COUPLINGS --out RUNS/world-reflow-d4
        --init-from RUNS/world-d4/weights/ema.safetensors
    Hardware and time: CPU cores with AMX; depth 4 trains 8 minutes on one rank, planned and not measured; each
    coupling takes 100 passes of the teacher.
    Expected: a straighter flow, better at 2 steps and a little worse at many (Rectified Flow, table 1a). Not run yet.
    From the paper (2-rectified flow++, arXiv 2405.20320): times dense at both ends, a = 4. Our choice: a tenth of the
    rate of `world-dN`, 40,000 images, no encoder dropout, as the guidance of the couplings is learnt with them.
    """
    base = world(depth)
    return replace(
        base,
        name=f"world-reflow-d{depth}",
        images=40_000,
        objective="reflow",
        formulation="rf/ushape(4.00)",
        optimizer=replace(base.optimizer, lr=base.optimizer.lr / 10),
        data=replace(base.data, encoder_dropout=0.0),
        validation=replace(base.validation, protocol="coupled"),
    )


def world_distil(depth: int) -> Recipe:
    """Distillation to one step in the miniature world: from a student of reflow, or from the teacher (the direct arm).

    Command: deepspeed --num_gpus 2 --module trainer train world-distil-d4 --data COUPLINGS --out RUNS/world-distil-d4
        --init-from RUNS/world-reflow-d4/weights/ema.safetensors
        deepspeed --num_gpus 2 --module trainer train world-distil-d4 --data COUPLINGS --out RUNS/sharp-d4
        --init-from RUNS/world-distil-d4/weights/ema.safetensors --student.perceptual features:world:clip
    Hardware and time: CPU cores with AMX; depth 4 trains 8 minutes on one rank, planned and not measured; the second
    command 19 minutes, with decoder and CLIP.
    Expected: after reflow better at one step than the direct arm, whose pictures blur (InstaFlow, arXiv 2309.06380).
    The second command adds distances of features of the world's own tiny CLIP, in the seat of LPIPS. Not run yet.
    From the paper (InstaFlow's): the error in latents first, then a perceptual one; no dropped captions. Our choice:
    the rest as `world-reflow-dN`, to compare both at equal couplings and images; uniform times.
    """
    base = world_reflow(depth)
    return replace(base, name=f"world-distil-d{depth}", objective="distil", formulation="rf")


def world_meanflow(depth: int) -> Recipe:
    """MeanFlow in the miniature world, on couplings: average velocities, one model for any number of steps.

    Command: deepspeed --num_gpus 2 --module trainer train world-meanflow-d4 --data COUPLINGS
        --out RUNS/world-meanflow-d4 --init-from RUNS/world-d4/weights/ema.safetensors
    Hardware and time: CPU cores with AMX; depth 4 trains 20 minutes on one rank, estimated: two of three passes compute
    in fp32.
    Expected: better at one step than reflow (Re-MeanFlow, arXiv 2511.23342). Not run yet.
    From the paper (Re-MeanFlow's): U-shaped times, the pair's own velocity. Our choice: pseudo-Huber, whose gradient
    is that of an adaptive weight with power 1/2; half of the samples at r = t and a quarter at r = 0, as AnyFlow has
    them in SimpleTuner; du/dt over t +- 0.005, as there; the rest as `world-reflow-dN`.
    """
    base = world_reflow(depth)
    return replace(
        base,
        name=f"world-meanflow-d{depth}",
        model=replace(base.model, second_time=True),
        objective="meanflow",
        student=Student(loss="huber"),
    )


def world_perflow(depth: int) -> Recipe:
    """PeRFlow in the miniature world: a flow in four straight windows, from ordinary data and the frozen teacher.

    Command: deepspeed --num_gpus 2 --module trainer train world-perflow-d4 --data DATA --out RUNS/world-perflow-d4
        --init-from RUNS/world-d4/weights/ema.safetensors
    Hardware and time: CPU cores with AMX; depth 4 trains 28 minutes on one rank, planned and not measured.
    Expected: four steps near the teacher's 25 (PeRFlow, arXiv 2405.07510, figure 1). Not run yet.
    From the paper (PeRFlow's): four windows, 8 steps of the teacher in each, uniform times, captions dropped as in the
    teacher's training, so that the student is guided itself. Our choice: Euler steps; the rest as `world-reflow-dN`. To
    bake a guidance in instead: --student.guidance 1.5 --data.encoder-dropout 0.
    """
    base = world_reflow(depth)
    return replace(
        base,
        name=f"world-perflow-d{depth}",
        objective="perflow",
        formulation="rf",
        student=Student(steps=4, guidance=1.0),
        data=world(depth).data,
        validation=world(depth).validation,
    )


@dataclass(frozen=True)
class Family:
    """Recipes that differ in depth alone. The function gives each its name, which stands nowhere else."""

    make: Callable[[int], Recipe]
    depths: tuple[int, ...]

    def recipes(self) -> dict[str, Callable[[], Recipe]]:
        return {self.make(depth).name: partial(self.make, depth) for depth in self.depths}


# Families that are trained from the start, and therefore as a ladder, by the ladder's name.
FAMILIES: dict[str, Family] = {
    "world": Family(world, WORLD_DEPTHS),
    "pretrain-256": Family(pretrain_256, DEPTHS),
    **{f"world-{name}": Family(partial(world_backbone, name), (2, 3, 4)) for name in BACKBONES if name != "mmdit"},
    "world-captions-original": Family(partial(world_captions, 1.0), (2, 3, 4)),
    "world-captions-mixed": Family(partial(world_captions, 0.5), (2, 3, 4)),
}
# Families that start from the weights of a stage before.
LATER_STAGES = (
    Family(partial(high_resolution, resolution=512), DEPTHS),
    Family(partial(high_resolution, resolution=1024), DEPTHS),
    Family(dpo, (24, 38)),
    Family(world_dpo, WORLD_DEPTHS),
    Family(reflow, (24, 38)),
    Family(world_reflow, WORLD_DEPTHS),
    Family(distil, (24, 38)),
    Family(world_distil, (2, 3, 4)),
    Family(meanflow, (24, 38)),
    Family(world_meanflow, (2, 3, 4)),
    Family(perflow, (24, 38)),
    Family(world_perflow, (2, 3, 4)),
)
SINGLE = (partial(captions, 1.0), partial(captions, 0.5), *(partial(study, name) for name in BACKBONES))
RECIPES: dict[str, Callable[[], Recipe]] = {
    **{name: make for family in (*FAMILIES.values(), *LATER_STAGES) for name, make in family.recipes().items()},
    **{make().name: make for make in SINGLE},
}


def get_recipe(name: str) -> Recipe:
    """A recipe by name; UserError with the nearest known one."""
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}{nearest(name, RECIPES)}; known: {', '.join(RECIPES)}")
    return RECIPES[name]()


def get_family(name: str) -> Callable[[int], Recipe]:
    """A ladder's function of depth by name."""
    if name not in FAMILIES:
        raise UserError(f"unknown ladder {name!r}{nearest(name, FAMILIES)}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name].make
