"""Models born in diffusers: saved by it, converted, denoised by our sampler over 10 steps, to the same latents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model_files import CONFIG, META, load_pipeline, weights_of, write_vae
from torch import nn

from infra.errors import UserError
from model.backbones.mmdit import MMDiTConfig
from model.diffusion.flow import get_formulation
from model.diffusion.grids import make_sampling_grid
from model.diffusion.sampler import solve
from model.encoders.text import TextCond
from model.files.convert import convert
from model.files.pipeline import make_scheduler_config
from model.files.weights import load_model, load_weights, read_meta, save_weights

BORN = {
    "sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 64,
    "num_attention_heads": 3, "joint_attention_dim": 48, "caption_projection_dim": 192, "pooled_projection_dim": 24,
    "out_channels": 4, "pos_embed_max_size": 12,
}  # fmt: skip


def born(folder: Path, **changes: object) -> nn.Module:
    """A random transformer, saved as its own class saves it."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(5)
    model = SD3Transformer2DModel(**{**BORN, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"qk_norm": "rms_norm"}, (16, 16)),
        ({}, (12, 20)),
        ({"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}, (20, 8)),
    ],
)
def test_ten_steps_of_theirs_are_ten_of_ours(tmp_path: Path, changes: dict, size: tuple[int, int]) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = born(tmp_path / "born", **changes)
    convert(tmp_path / "born", tmp_path / "ours.safetensors", kind="raw")
    model, meta = load_model(tmp_path / "ours.safetensors")
    assert meta["config"]["qk_norm"] == ("qk_norm" in changes)
    g = torch.Generator().manual_seed(6)
    noise = torch.randn(2, 4, *size, generator=g)
    text, uncond = (TextCond(torch.randn(2, 6, 48, generator=g), torch.randn(2, 24, generator=g)) for _ in range(2))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    latents = noise.clone()
    with torch.no_grad():
        for t in scheduler.timesteps:
            with_text, without = (
                theirs(latents, c.context_BLD, c.pooled_BP, t.expand(2), return_dict=False)[0] for c in (text, uncond)
            )
            latents = scheduler.step(without + 4.0 * (with_text - without), t, latents, return_dict=False)[0]
    ours = solve(
        model, noise, text, uncond, steps=10, guidance=4.0, shift=3.0, formulation="rf", grid="released"
    ).latents
    assert float((ours - latents).abs().max()) <= 1e-4
    assert float((ours - noise).std()) > 0.1
    # ... and back into its own class, tensor for tensor.
    convert(tmp_path / "ours.safetensors", tmp_path / "again")
    returned = type(theirs).from_pretrained(tmp_path / "again" / "transformer", local_files_only=True)
    for name, value in theirs.state_dict().items():
        assert torch.equal(returned.state_dict()[name], value), name


def test_foreign_shapes_are_refused(tmp_path: Path) -> None:
    born(tmp_path / "wide", num_attention_heads=2, caption_projection_dim=128)
    with pytest.raises(UserError, match="3 layers with 2 heads"):
        convert(tmp_path / "wide", tmp_path / "x.safetensors")
    born(tmp_path / "short")
    config = tmp_path / "short" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pooled_projection_dim": 20}))
    with pytest.raises(UserError, match=r"misshapen .time_text_embed\.text_embedder\.linear_1\.weight"):
        convert(tmp_path / "short", tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no weights file"):
        load_weights(tmp_path / "x.safetensors")


STUDENT = {"objective": "distil", "round": 1, "solver": "euler", "guidance": 1.5, "guidance_kind": "baked"}


def export_student(tmp_path: Path, steps: int | None, shift: float) -> Path:
    """A pipeline folder of random weights that call themselves a student."""
    config = MMDiTConfig.from_json({**CONFIG.to_json(), "pos_tokens": 4})
    told = STUDENT | ({} if steps is None else {"steps": steps, "sigmas": student_grid(steps, shift).tolist()})
    meta = {**META, "config": config.to_json(), "shift": shift, "formulation": "rf", "few_step": told}
    save_weights(tmp_path / "student.safetensors", weights_of(config), meta)
    convert(tmp_path / "student.safetensors", tmp_path / "pipeline", vae=write_vae(tmp_path / "vae"))
    return tmp_path / "pipeline"


def student_grid(steps: int, shift: float) -> torch.Tensor:
    return make_sampling_grid(get_formulation("rf"), steps, shift=shift)


@pytest.mark.parametrize(
    ("steps", "shift", "plain"),
    [(1, 1.0, True), (2, 1.0, True), (4, 1.0, True), (8, 1.0, True), (1, 3.0, True), (2, 3.0, True), (4, 3.0, False)],
)
def test_a_students_pipeline_draws_its_own_latents(tmp_path: Path, steps: int, shift: float, plain: bool) -> None:
    """`plain`: num_inference_steps alone is enough, as the exported scheduler has the student's grid."""
    folder = export_student(tmp_path, steps, shift)
    absent = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    pipeline = load_pipeline(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(6)
    noise, context, pooled = (torch.randn(*s, generator=g) for s in ((2, 4, 8, 8), (2, 6, 48), (2, 24)))
    model, meta = load_model(tmp_path / "student.safetensors")
    assert meta["few_step"]["sigmas"] == student_grid(steps, shift).tolist()
    ours = solve(model, noise, TextCond(context, pooled), steps=steps, shift=shift, formulation="rf").latents

    def draw(**more: object) -> torch.Tensor:
        side = 8 * pipeline.vae_scale_factor
        return pipeline(
            prompt_embeds=context, pooled_prompt_embeds=pooled, latents=noise.clone(), guidance_scale=1.0, height=side,
            width=side, num_inference_steps=steps, output_type="latent", **more,
        ).images  # fmt: skip

    assert float((draw(sigmas=[1 - i / steps for i in range(steps)]) - ours).abs().max()) <= 1e-4, "as the card says"
    assert (float((draw() - ours).abs().max()) <= 1e-4) == plain
    assert float((ours - noise).std()) > 0.1
    card = (folder / "README.md").read_text()
    assert f"steps = {steps}\nsigmas = [1 - i / steps for i in range(steps)]\n" in card
    assert ("alone gives the same" in card) == plain
    assert "Guidance 1.5 is baked in" in card


def test_a_scheduler_of_its_own_grid_would_end_a_student_of_two_steps_at_a_thousandth(tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(2)
    assert theirs.sigmas.tolist() == pytest.approx([1, 0.001, 0])
    assert make_scheduler_config({"shift": 1.0}) == {"shift": 1.0}, "no student: as released models have it"
    assert make_scheduler_config({"few_step": STUDENT}) == {"shift": 1.0}, "any number of steps"
    for steps in (2, 3, 4, 8):
        student = FlowMatchEulerDiscreteScheduler(**make_scheduler_config({"few_step": STUDENT | {"steps": steps}}))
        student.set_timesteps(steps)
        torch.testing.assert_close(student.sigmas, student_grid(steps, 1.0).float(), atol=1e-6, rtol=0)


def test_exports_in_every_dialect_carry_how_a_student_is_sampled(tmp_path: Path) -> None:
    folder = export_student(tmp_path, 4, 1.0)
    convert(tmp_path / "student.safetensors", tmp_path / "single.safetensors", to="sd3")
    wanted = read_meta(tmp_path / "student.safetensors")["few_step"]
    assert (wanted["sigmas"], wanted["steps"]) == ([1.0, 0.75, 0.5, 0.25, 0.0], 4)
    for file in (tmp_path / "single.safetensors", folder / "transformer" / "diffusion_pytorch_model.safetensors"):
        assert read_meta(file)["few_step"] == wanted
    for source, name in ((folder, "a"), (tmp_path / "single.safetensors", "b")):
        convert(source, tmp_path / f"{name}.safetensors", to="beeline")
        assert read_meta(tmp_path / f"{name}.safetensors")["few_step"] == wanted
