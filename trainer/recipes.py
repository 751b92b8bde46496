"""The recipes by name. One dial, depth, makes a ladder: width 64*depth, heads = depth, everything else follows."""

from collections.abc import Callable

from infra.errors import UserError, nearest
from model.mmdit import MMDiTConfig
from trainer.recipe import EMA, Data, Logging, Optimizer, Parallel, Recipe, Schedule, Validation


def world(depth: int) -> Recipe:
    """The miniature world: 64x64 scenes as 64 image tokens with 32 text tokens, fp32, every parameter sharded.

    deepspeed --num_gpus 2 --module trainer train world-d4 --data URI --out RUN
    Hardware: two CPU cores; images/s in trainer/README.md. The rate falls with the width as 1/sqrt(width): our choice.
    Batch 16, for short runs live by their number of steps: after 1,700 images depth 3 stood at a training loss of 1.0
    with it, 1.2 with batch 32, 1.5 with 64. Encoder dropout leaves 10 % of the samples without any text, as the
    paper's 46.4 % does for three encoders; here there are two.
    """
    return Recipe(
        name=f"world-d{depth}",
        model=MMDiTConfig(depth=depth, in_channels=8, context_width=384, pooled_width=128),
        images=115_200,
        global_batch=16,
        precision="fp32",
        optimizer=Optimizer(lr=1e-3 * (4 / depth) ** 0.5, betas=(0.9, 0.99)),
        schedule=Schedule(warmup_images=1_600, cooldown=0.3),
        ema=EMA(profiles=("power:0.10",)),
        data=Data(resolution=64, latent_shape=(8, 16, 16), text_tokens=32, encoder_dropout=0.316),
        parallel=Parallel(persistence_threshold=0, reduce_bucket=4_000_000, prefetch=4_000_000),
        validation=Validation(samples=128, batch=32),
        logging=Logging(samples=8),
    )


def pretrain_256(depth: int) -> Recipe:
    """SD3's scaling runs: 256x256, batch 4096, 500,000 steps, same settings for all sizes (paper, section 5.3.3).

    deepspeed --hostfile HOSTS --module trainer train d24 --data s3://... --out s3://...
    From the paper: depths, width and heads, batch, steps, patch 2, 16 latent channels, logit-normal times, 50/50
    captions, encoder dropout 46.4 %. Our choice (the paper is silent): rate 1e-4 with 1000 warm-up steps (as in its
    study of formulations), betas, clipping, QK-norm from the start, EMA 0.99 every 100 steps plus two power profiles.
    Depth 38 needed its rate lowered at 300,000 steps to avoid divergence. Not run yet.
    """
    batch = 4096
    return Recipe(
        name=f"d{depth}",
        model=MMDiTConfig(depth=depth),
        images=500_000 * batch,
        global_batch=batch,
        optimizer=Optimizer(lr=1e-4),
        schedule=Schedule(warmup_images=1000 * batch),
        ema=EMA(profiles=("power:0.10", "power:0.05", f"decay:0.99@{100 * batch}")),
        data=Data(resolution=256, latent_shape=(16, 32, 32), text_tokens=154),
        parallel=Parallel(zero_stage=3 if depth >= 24 else 2, checkpoint_blocks=depth >= 24),
        validation=Validation(every=50_000 * batch, samples=4096, batch=64),
        logging=Logging(log_every=100 * batch, save_every=5_000 * batch),
    )


FAMILIES: dict[str, Callable[[int], Recipe]] = {
    "world": world,
    "pretrain-256": pretrain_256,
}

RECIPES: dict[str, Callable[[], Recipe]] = {
    "world-d1": lambda: world(1),
    "world-d2": lambda: world(2),
    "world-d3": lambda: world(3),
    "world-d4": lambda: world(4),
    "world-d5": lambda: world(5),
    "world-d6": lambda: world(6),
    "d15": lambda: pretrain_256(15),
    "d18": lambda: pretrain_256(18),
    "d21": lambda: pretrain_256(21),
    "d24": lambda: pretrain_256(24),
    "d30": lambda: pretrain_256(30),
    "d38": lambda: pretrain_256(38),
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
    return FAMILIES[name]
