"""The recipes of the SD3 paper (Esser et al. 2024). What it does not state is our choice, and marked so."""

from dataclasses import replace

from model.backbone import BACKBONES
from model.backbones.mmdit import MMDiTConfig
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

DEPTHS = (15, 18, 21, 24, 30, 38)


def pretrain_256(depth: int) -> Recipe:
    """SD3's scaling runs: 256x256, batch 4096, 500,000 steps, same settings for all sizes (paper, section 5.3.3).

    Command: deepspeed --hostfile HOSTS --module trainer train d24 --data s3://... --out s3://...
    Hardware and time (planned, 40 % of an H100's peak): 64 H100, 0.4 days (d15) to 8.5 days (d38).
    Expected: GenEval after the 512 stage 0.58 (d18), 0.62 (d24), 0.64 (d30), 0.68 (d38) (table 5). Not run yet.
    From the paper: depths, width and heads, batch, steps, patch 2, 16 latent channels, logit-normal times, 50/50
    captions, encoder dropout 46.4 %. Our choice (the paper is silent): rate 1e-4 with 1000 warm-up steps (as in its
    study of formulations), betas, clipping, QK-norm from the start, EMA 0.99 every 100 steps plus two power profiles.
    Depth 38 needed its rate lowered at 300,000 steps to avoid divergence: save, then --resume PATH with a lower rate.
    """
    batch = 4096
    return Recipe(
        name=f"d{depth}",
        model=MMDiTConfig(depth=depth),
        images=500_000 * batch,
        global_batch=batch,
        precision="bf16",
        optimizer=Optimizer(lr=1e-4),
        schedule=Schedule(warmup_images=1000 * batch),
        ema=EMA(profiles=("power:0.10", "power:0.05", f"decay:0.99@{100 * batch}")),
        data=Data(resolution=256, latent_shape=(16, 32, 32), text_tokens=154),
        parallel=Parallel(zero_stage=3 if depth >= 24 else 2, checkpoint_blocks=depth >= 24),
        validation=Validation(every=50_000 * batch, samples=4096, batch=64),
        logging=Logging(log_every=100 * batch, save_every=5_000 * batch),
    )


def high_resolution(depth: int, resolution: int) -> Recipe:
    """The stages after 256 px: 512 or 1024 px in mixed aspect ratios, from the weights of the stage before.

    Command: deepspeed --hostfile HOSTS --module trainer train d24-512 --data s3://... --out s3://...
        --init-from RUNS/d24/weights/ema.safetensors   (and d24-1024 from d24-512's)
    Hardware and time (planned, 40 % of an H100's peak): 64 H100; at 512 px 0.1 days (d15), 0.3 days (d24), 1.3 days
    (d38); at 1024 px 0.5 days (d15), 1.6 days (d24), 5.5 days (d38).
    Expected: GenEval 0.62 for d24-512, 0.68 for d38-512, 0.74 for d38-1024 with DPO (table 5). Not run yet.
    From the paper (section 5.3.2): QK-norm in both streams (added to weights that lack it), the position grid extended
    and scaled by 256/S, AdamW with eps 1e-15, bf16, at 1024 px times shifted by 3.0. Our choice (the paper is silent):
    shift sqrt(3) at 512 px, halfway on the logarithmic scale; batch 1024, 100,000 steps, rate 5e-5 with a cooldown;
    grids for aspects up to 1:4.
    """
    base, batch = pretrain_256(depth), 1024
    side = resolution // 16
    return replace(
        base,
        name=f"d{depth}-{resolution}",
        model=MMDiTConfig(depth=depth, pos_tokens=side, pos_max=2 * side),
        images=100_000 * batch,
        global_batch=batch,
        shift=3.0 if resolution == 1024 else 3.0**0.5,
        optimizer=Optimizer(lr=5e-5, eps=1e-15),
        schedule=Schedule(warmup_images=1000 * batch, cooldown=0.2),
        ema=EMA(profiles=("power:0.10", "power:0.05", f"decay:0.99@{100 * batch}")),
        data=Data(resolution=resolution, latent_shape=(16, 2 * side, 2 * side), text_tokens=154),
        parallel=Parallel(
            zero_stage=3 if depth >= 24 else 2, checkpoint_blocks=True, micro_batch=8 if resolution == 512 else 2
        ),
        validation=Validation(every=10_000 * batch, samples=2048, batch=16),
        logging=Logging(log_every=100 * batch, save_every=2_000 * batch),
    )


def dpo(depth: int) -> Recipe:
    """Diffusion-DPO after the 1024 px stage: rank-128 adapters on all linear layers (paper, appendix C).

    Command: deepspeed --hostfile HOSTS --module trainer train dpo-d24 --data s3://PAIRS --out s3://...
        --init-from RUNS/d24-1024/weights/ema.safetensors
    Hardware and time (planned, 40 % of an H100's peak): 64 H100, 0.4 hours (d24) to 0.6 hours (d38).
    Expected: GenEval 0.71 (d38-512), 0.74 (d38-1024, table 5). Not run yet.
    From the paper (steps by a secondary source): 4,000 steps for 2B (d24), 2,000 for 8B (d38), rank 128, all linear
    layers. Our choice (the paper is silent): beta 2000 (Wallace et al. used 2000 to 5000), batch of 128 pairs, rate
    1e-5 with 100 warm-up steps, alpha = rank, no dropped captions, EMA of the adapters, 1024 px square pictures.
    """
    base, batch = high_resolution(depth, 1024), 128
    return replace(
        base,
        name=f"dpo-d{depth}",
        images=(4000 if depth == 24 else 2000) * batch,
        global_batch=batch,
        objective="dpo",
        dpo=DPO(beta=2000.0),
        lora=LoRA(rank=128),
        optimizer=Optimizer(lr=1e-5, eps=1e-15),
        schedule=Schedule(warmup_images=100 * batch),
        ema=EMA(profiles=("power:0.10",)),
        data=replace(base.data, encoder_dropout=0.0),
        parallel=replace(base.parallel, micro_batch=1),
        guard=Guard(spike=None),
        validation=Validation(every=500 * batch, samples=1024, batch=16),
        logging=Logging(log_every=10 * batch, save_every=500 * batch),
    )


def reflow(depth: int) -> Recipe:
    """One reflow at 256 px: what InstaFlow did with SD 1.5 (arXiv 2309.06380), with an MM-DiT.

    Command: python -m data_pipeline couple --teacher s3://RUNS/d24/weights/ema.safetensors --prompts s3://DATA
        --count 1600000 --guidance 1.5 --gpus-per-worker 1 --out s3://COUPLINGS
        deepspeed --hostfile HOSTS --module trainer train reflow-d24 --data s3://COUPLINGS --out s3://...
        --init-from s3://RUNS/d24/weights/ema.safetensors
    Hardware and time (planned, 40 % of an H100's peak): 64 H100; the couplings 1.0 hours (d24) or 4.0 hours (d38) and
    56 GB, the training 0.7 hours (d24) or 2.5 hours (d38).
    Expected: a straighter flow; InstaFlow's 2-rectified flow reached FID-5k 47.0 at one step and 21.5 at 25 (SD 1.5:
    20.1 at 25). No reflow of a rectified-flow teacher of this size is published. Not run yet.
    From the paper (InstaFlow's): 1.6 million couplings, rate 1e-6, batch 1024 for 25,000 steps, 1000 warm-up steps, EMA
    0.9999, clipping at 1, guidance 1.5; times dense at both ends, a = 4, are those of 2-rectified flow++ (arXiv
    2405.20320). Our choice: 25 Heun steps, no encoder dropout, as the guidance of the couplings is learnt with them.
    """
    base, batch = pretrain_256(depth), 1024
    return replace(
        base,
        name=f"reflow-d{depth}",
        images=25_000 * batch,
        global_batch=batch,
        objective="reflow",
        formulation="rf/ushape(4.00)",
        optimizer=Optimizer(lr=1e-6),
        schedule=Schedule(warmup_images=1000 * batch),
        ema=EMA(profiles=("decay:0.9999", "power:0.10")),
        data=replace(base.data, encoder_dropout=0.0),
        validation=Validation(every=2_500 * batch, samples=4096, batch=64, protocol="coupled"),
        logging=Logging(log_every=100 * batch, save_every=2_500 * batch),
    )


def distil(depth: int) -> Recipe:
    """Distillation to one step at 256 px: what InstaFlow did after its reflow (arXiv 2309.06380).

    Command: deepspeed --hostfile HOSTS --module trainer train distil-d24 --data s3://COUPLINGS --out s3://...
        --init-from s3://RUNS/reflow-d24/weights/ema.safetensors   (the direct arm: d24's)
    Hardware and time (planned, 40 % of an H100's peak): 64 H100, 0.7 hours (d24) or 2.5 hours (d38).
    Expected: InstaFlow's one step reached FID-5k 31.0 after reflow and 40.9 directly (SD 1.4, 1.6 million couplings).
    Not run yet.
    From the paper (InstaFlow's): error in latents, then LPIPS (a second run from the first one's weights, with
    --student.perceptual lpips-vgg:FILE --student.latent-weight 0), batch 1024. Our choice: images and rate of
    `reflow-dN`.
    """
    return replace(reflow(depth), name=f"distil-d{depth}", objective="distil", formulation="rf")


def meanflow(depth: int) -> Recipe:
    """MeanFlow on couplings at 256 px (Re-MeanFlow, arXiv 2511.23342): one model for any number of steps.

    Command: deepspeed --hostfile HOSTS --module trainer train meanflow-d24 --data s3://COUPLINGS --out s3://...
        --init-from s3://RUNS/d24/weights/ema.safetensors
    Hardware and time (planned, 40 % of an H100's peak, though two passes of three compute in fp32): 64 H100, 1.0 hours
    (d24) or 3.8 hours (d38).
    Expected: Re-MeanFlow reached an FID of 3.03 at one step on ImageNet at 512 pixels; nothing of text to image is
    published. Not run yet.
    From the paper (Re-MeanFlow's): U-shaped times, the pair's own velocity, batch 128 for 100,000 steps. Our choice:
    pseudo-Huber, whose gradient is that of an adaptive weight with power 1/2; rate and batch of `reflow-dN`.
    """
    base = reflow(depth)
    return replace(
        base,
        name=f"meanflow-d{depth}",
        model=replace(base.model, second_time=True),
        objective="meanflow",
        student=Student(loss="huber"),
    )


def perflow(depth: int) -> Recipe:
    """PeRFlow at 256 px (arXiv 2405.07510): four straight windows, from the training data and the frozen teacher.

    Command: deepspeed --hostfile HOSTS --module trainer train perflow-d24 --data s3://DATA --out s3://...
        --init-from s3://RUNS/d24/weights/ema.safetensors
    Hardware and time (planned, 40 % of an H100's peak): 64 H100, 0.3 hours (d24) or 1.2 hours (d38).
    Expected: PeRFlow reached FID-5k 22.97 in four steps with SD 1.5 and 27.06 with SDXL. Not run yet.
    From the paper (PeRFlow's): four windows, 8 steps of the teacher in each, uniform times, rate 8e-5, batch 1024 for
    4,000 steps, captions dropped as in the teacher's training, so that the student is guided itself. Our choice: Euler
    steps. To bake a guidance in instead: --student.guidance 4.5 --data.encoder-dropout 0.
    """
    base, batch = reflow(depth), 1024
    return replace(
        base,
        name=f"perflow-d{depth}",
        images=4_000 * batch,
        objective="perflow",
        formulation="rf",
        student=Student(steps=4, guidance=1.0),
        optimizer=Optimizer(lr=8e-5),
        schedule=Schedule(warmup_images=400 * batch),
        ema=EMA(profiles=("power:0.10",)),  # 4,000 steps of decay 0.9999 would leave two thirds of the teacher
        data=pretrain_256(depth).data,
        validation=Validation(every=400 * batch, samples=4096, batch=64),
        logging=Logging(log_every=10 * batch, save_every=1_000 * batch),
    )


def captions(original: float) -> Recipe:
    """The caption ablation: depth 15 with original captions alone, or half of them synthetic (table 4).

    Command: deepspeed --num_gpus 8 --module trainer train captions-mixed --data s3://... --out RUN
    Hardware and time (planned, 40 % of an H100's peak): 8 H100, 0.8 days each.
    Expected: GenEval 43.3 with original, 49.8 with mixed captions. Not run yet.
    From the paper: depth 15, 250,000 steps at 256 px (recalled, not verified). Our choice: batch 2048, the rest as d15.
    """
    batch = 2048
    name = "captions-original" if original == 1 else "captions-mixed"
    base = pretrain_256(15)
    return replace(
        base,
        name=name,
        images=250_000 * batch,
        global_batch=batch,
        schedule=Schedule(warmup_images=1000 * batch),
        ema=EMA(profiles=("power:0.10", f"decay:0.99@{100 * batch}")),
        data=replace(base.data, original_captions=original),
        validation=Validation(every=25_000 * batch, samples=4096, batch=64),
        logging=Logging(log_every=100 * batch, save_every=5_000 * batch),
    )


def study(backbone: str = "mmdit") -> Recipe:
    """The setup of section 5.1: formulations (`sweep formulations study`) and backbones (figure 4) on CC12M.

    Command: deepspeed --num_gpus 8 --module trainer train study-cross_dit --data s3://... --out RUN
    Hardware and time (planned, 40 % of an H100's peak): 8 H100, 0.13 to 0.21 days each.
    Expected: validation loss dit > uvit > cross_dit > mmdit, mmdit3 a little lower still (figure 4). Not run yet.
    From the paper: batch 1024, AdamW at 1e-4 with 1000 warm-up steps, EMA 0.99 every 100 steps, eight levels of
    validation. Our choice (not stated): depth 15, 100,000 steps, 256 px, QK-norm.
    """
    batch = 1024
    base = pretrain_256(15)
    return replace(
        base,
        name=f"study-{backbone}",
        model=BACKBONES[backbone].for_text(base.data.text_tokens, depth=15),
        images=100_000 * batch,
        global_batch=batch,
        schedule=Schedule(warmup_images=1000 * batch),
        ema=EMA(profiles=(f"decay:0.99@{100 * batch}", "power:0.10")),
        validation=Validation(every=5_000 * batch, samples=4096, batch=64),
        logging=Logging(log_every=100 * batch, save_every=5_000 * batch),
    )
