"""Writes infra/docs/few_step_plans.md by the planner: `python tests/few_step_plans.py` (a minute)."""

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from data_pipeline.couplings.command import TAR_BYTES, CoupleOptions
from data_pipeline.couplings.teacher import count_forwards
from trainer.machines import get_machine
from trainer.planning.frozen import FrozenCost, count_frozen_of
from trainer.planning.hardware_plan import HardwarePlan, make_hardware_plan
from trainer.recipe import Recipe, Student
from trainer.recipes import get_recipe

PAGE = Path(__file__).parent.parent / "infra" / "docs" / "few_step_plans.md"
DEPTHS, GPUS, MACHINE = (24, 38), 64, get_machine("h100-80")
COUNT, GUIDANCE = 1_600_000, 1.5  # couplings, as InstaFlow had them
A100 = get_machine("a100-80").flops
HEAD = """\
# Few steps at depths 24 and 38: plans

**Not run.** No line of these tables was run; the planner computed all of them (`python tests/few_step_plans.py` writes
this page). The stages are those of InstaFlow (Liu et al., [arXiv 2309.06380](https://arxiv.org/abs/2309.06380)) with an
MM-DiT at 256 pixels; [recipes](recipes.md) has the commands and settings, [few steps](few_steps.md) explains the words.

Hardware: GPUS H100 (80 GB, 8 a node), each at 40 % of its peak of 989 TFLOP/s in bf16. Hours are by the clock, on all
of them. A100-days convert the same FLOPs to A100 at the same share of their peak, to compare with InstaFlow's. Memory
is that of one device; disk is what the stage leaves: a run folder at its end, or the couplings.
"""
COLUMNS = (
    "stage", "recipe", "images", "FLOPs", "hours", "A100-days", "memory, GiB", "disk, GB",
)  # fmt: skip
FEET = """\
- **Couplings**: FORWARDS passes of the teacher each (25 Heun steps, guidance 1.5), 16 x 32 x 32 numbers in fp16.
  Captions and text features stay where they are.
- **Distil, direct** is the same run from the teacher's weights instead of the reflowed ones, at equal couplings and
  images. It is the arm to compare with.
- **Distil, LPIPS** starts from the run above it, as InstaFlow's second stage did: `--student.perceptual lpips-vgg:FILE
  --student.latent-weight 0`. Its FLOPs and memory have the frozen decoder (SD3's layout: widths 128, 256, 512, 512) and
  VGG at 224 pixels in them. Both compute in fp32, which the hours leave out: they are too low for it.

## InstaFlow, to compare with

As published, with SD's U-Nets at 512 pixels on other data: no line of it can be reached or missed by the plans above.

| model | parameters | A100-days | FID-5k (COCO 2017), 1 step | CLIP score | seconds a picture (A100) |
|---|---:|---:|---:|---:|---:|
| SD 1.4, distilled directly (3.2 M couplings) | 0.9 B | | 40.9 | 0.255 | |
| SD 1.4, reflow then distilled (1.6 M each) | 0.9 B | 24.65, couplings included | 31.0 | 0.285 | |
| InstaFlow-0.9B | 0.9 B | 199 (reflow 75.2, distillation 108) | 23.4 | 0.304 | 0.09 |
| InstaFlow-1.7B | 1.7 B | not stated | 22.4 | | 0.12 |
| SD 1.5, 25 steps of DPM-Solver | 0.9 B | | 20.1 (25 steps) | | |
"""


def build_page(lpips: FrozenCost) -> str:
    """`lpips`: what decoder and VGG add to each image."""
    parts = [HEAD.replace("GPUS", str(GPUS))]
    for depth in DEPTHS:
        parts.append("\n".join(_tabulate(depth, lpips)))
    return "\n".join([*parts, FEET.replace("FORWARDS", str(_count_passes()))])


def _tabulate(depth: int, lpips: FrozenCost) -> Iterator[str]:
    teacher, reflow, distil = (get_recipe(f"{stage}d{depth}") for stage in ("", "reflow-", "distil-"))
    yield f"## Depth {depth}: {teacher.model.count_parameters() / 1e9:.1f} billion parameters\n"
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|---|---|" + "---:|" * (len(COLUMNS) - 2)
    yield _describe_run("teacher", teacher)
    yield _describe_couplings(teacher)
    yield _describe_run("reflow", reflow)
    yield _describe_run("distil, latents", distil)
    yield _describe_run("distil, direct", distil)
    yield _describe_run("distil, LPIPS", distil, perceptual=lpips)
    yield ""


def _describe_run(stage: str, recipe: Recipe, **more: FrozenCost) -> str:
    plan: HardwarePlan = make_hardware_plan(recipe, world_size=GPUS, machine=MACHINE, **more)
    memory = plan.bytes_per_rank[f"stage{plan.zero_stage}"]["device"] / 2**30
    cells = (recipe.name, plan.images, plan.train_flops, plan.time.hours, memory, plan.storage_bytes)
    return _make_row(stage, *cells)


def _describe_couplings(teacher: Recipe) -> str:
    channels, height, width = teacher.data.latent_shape
    flops = COUNT * _count_passes() * teacher.model.count_forward_flops(height, width, teacher.data.text_tokens)
    hours = flops / (GPUS * MACHINE.flops * MACHINE.efficiency) / 3600
    return _make_row("couplings", "", COUNT, flops, hours, None, COUNT * (2 * channels * height * width + TAR_BYTES))


def _count_passes() -> int:
    options = {field.name: field.default for field in dataclasses.fields(CoupleOptions)}
    found = count_forwards(options["solver"], options["steps"], guidance=GUIDANCE, formulation="rf")
    assert found is not None
    return found


def _make_row(stage: str, name: str, images: int, flops: float, hours: float, memory: float | None, disk: int) -> str:
    days = flops / (A100 * MACHINE.efficiency) / 86400
    cells = (
        stage, f"`{name}`" if name else f"{COUNT:,} of them", f"{images / 1e6:,.1f} M", f"{flops:.2e}", f"{hours:,.1f}",
        f"{days:,.1f}", "" if memory is None else f"{memory:.0f}", f"{disk / 1e9:,.0f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def count_lpips(folder: Path) -> FrozenCost:
    """Of SD3's decoder and VGG, with made-up weights: costs depend on shapes alone."""
    from diffusers import AutoencoderKL
    from torchvision.models import vgg16

    widths = (128, 256, 512, 512)
    AutoencoderKL(
        block_out_channels=widths, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=16, use_quant_conv=False,
        use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609,
    ).save_pretrained(folder / "vae")  # fmt: skip
    state = {name: tensor for name, tensor in vgg16().state_dict().items() if name.startswith("features.")}
    torch.save(state, folder / "vgg.pth")
    student = Student(perceptual=f"lpips-vgg:{folder / 'vgg.pth'}")
    return count_frozen_of(dataclasses.replace(get_recipe("distil-d24"), student=student), str(folder / "vae"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        PAGE.write_text(build_page(count_lpips(Path(scratch))))
