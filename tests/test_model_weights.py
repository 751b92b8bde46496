"""Weights in and out: our files and their refusals, SD3 single files, diffusers folders, a whole SD3 pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from model_files import CONFIG, DUAL, META, load_pipeline, saved, weights_of, write_sd3_encoders, write_vae
from torch import Tensor
from torch.overrides import TorchFunctionMode

from infra.codec import from_json, to_json
from infra.errors import UserError
from model.backbones.mmdit import MMDiTConfig
from model.diffusion.sampler import solve
from model.encoders.networks import load_text_encoders
from model.encoders.text import EncoderSpec, TextCond, TextSpec
from model.files.convert import convert
from model.files.names import make_full_positions, to_sd3
from model.files.weights import load_model, load_weights, read_meta, save_weights


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_weights_round_trip_with_their_metadata(tmp_path: Path) -> None:
    path = saved(tmp_path)
    state, meta = load_weights(path)
    assert_same(state, weights_of())
    assert (meta["kind"], meta["images_seen"]) == ("ema", 7)
    model, _ = load_model(path)
    assert not model.training
    assert [p.name for p in tmp_path.iterdir()] == ["ema.safetensors"]


def test_unfit_tensors_are_refused_by_name(tmp_path: Path) -> None:
    good = weights_of()
    first = "blocks.0.image.qkv.linear.weight"
    cases = {
        "1 missing .blocks.0.image.qkv.linear.weight.": {k: v for k, v in good.items() if k != first},
        "1 unexpected .extra.": {**good, "extra": torch.zeros(1)},
        r"1 misshapen .blocks.0.image.qkv.linear.weight: \(0,\)": {**good, first: torch.zeros(0)},
        "1 not finite .blocks.0.image.qkv.linear.weight.": {**good, first: torch.full_like(good[first], torch.nan)},
    }
    for says, state in cases.items():
        with pytest.raises(UserError, match=says):
            save_weights(tmp_path / "w.safetensors", state, META)
    with pytest.raises(UserError, match=r"raw\|ema"):
        save_weights(tmp_path / "w.safetensors", good, {**META, "kind": "best"})
    assert not list(tmp_path.iterdir())


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = saved(tmp_path)
    with pytest.raises(UserError, match="no weights file"):
        load_weights(tmp_path / "none.safetensors")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="not a readable"):
        load_weights(torn)
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="convert"):
        load_weights(tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="not an SD3 file"):
        convert(tmp_path / "foreign.safetensors", tmp_path / "x.safetensors")


@pytest.mark.parametrize("config", [CONFIG, DUAL, MMDiTConfig.from_json({**CONFIG.to_json(), "qk_norm": False})])
@pytest.mark.parametrize("target", ["there.safetensors", "there"])
def test_sd3_and_diffusers_files_come_back_as_they_went(tmp_path: Path, config: MMDiTConfig, target: str) -> None:
    path = saved(tmp_path, config)
    said = convert(path, tmp_path / target)
    assert ("(sd3)" if target.endswith("safetensors") else "(diffusers)") in said
    convert(tmp_path / target, tmp_path / "back.safetensors")
    assert_same(load_weights(tmp_path / "back.safetensors")[0], weights_of(config))
    assert read_meta(tmp_path / "back.safetensors")["config"] == config.to_json()


def test_an_sd3_release_with_encoders_and_its_own_positions(tmp_path: Path) -> None:
    """As Stability ships it: fp16, other networks in the same file, no metadata, positions of another target."""
    from safetensors.torch import save_file

    moved = MMDiTConfig.from_json({**CONFIG.to_json(), "pos_tokens": 10, "pos_base": 5})
    tensors = {k: v.half().contiguous() for k, v in to_sd3(moved, weights_of())}
    tensors |= {"first_stage_model.x": torch.zeros(2), "text_encoders.clip_l.y": torch.zeros(2)}
    save_file(tensors, tmp_path / "sd3_medium.safetensors")
    convert(tmp_path / "sd3_medium.safetensors", tmp_path / "ours.safetensors", kind="raw")
    state, meta = load_weights(tmp_path / "ours.safetensors")
    config = MMDiTConfig.from_json(meta["config"])
    assert config.pos_stored
    assert meta["kind"] == "raw"
    expected = make_full_positions(moved, {}).half().float()
    assert torch.equal(make_full_positions(config, state), expected)
    model, _ = load_model(tmp_path / "ours.safetensors")
    assert torch.equal(model.positions.make_full_table(), expected)
    del tensors["model.diffusion_model.joint_blocks.1.x_block.mlp.fc1.bias"]
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"missing .joint_blocks\.1\.x_block\.mlp\.fc1\.bias"):
        convert(tmp_path / "less.safetensors", tmp_path / "x.safetensors")


def test_qk_norm_can_be_added_to_weights_trained_without_it(tmp_path: Path) -> None:
    """All weights stay, scales of 1 join, and normalising the queries and keys by hand gives the same output."""
    plain = MMDiTConfig.from_json({**CONFIG.to_json(), "qk_norm": False})
    saved(tmp_path, plain)
    convert(tmp_path / "ema.safetensors", tmp_path / "normed.safetensors", to="beeline", with_qk_norm=True)
    state, meta = load_weights(tmp_path / "normed.safetensors")
    assert meta["config"] == CONFIG.to_json()
    assert meta["images_seen"] == 7
    before = weights_of(plain)
    assert_same({name: x for name, x in state.items() if name in before}, before)
    added = set(state) - set(before)
    assert len(added) == 4 * CONFIG.depth
    assert all(torch.equal(state[name], torch.ones(64)) for name in added)
    model, _ = load_model(tmp_path / "normed.safetensors")
    bare = plain.build()
    bare.load_state_dict(before)
    g = torch.Generator().manual_seed(1)
    x, t_B = torch.randn(2, 4, 16, 16, generator=g), torch.rand(2, generator=g)
    text = TextCond(torch.randn(2, 6, 48, generator=g), torch.randn(2, 24, generator=g))
    with NormalisedAttention():
        torch.testing.assert_close(bare(x, t_B, text), model(x, t_B, text), atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="has QK-norm already"):
        convert(tmp_path / "normed.safetensors", tmp_path / "x.safetensors", to="beeline", with_qk_norm=True)


class NormalisedAttention(TorchFunctionMode):
    """Every attention reads queries and keys of root mean square 1."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            args = (*(x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() for x in args[:2]), *args[2:])
        return func(*args, **(kwargs or {}))


def test_exported_pipeline_loads_silently_and_denoises_alike(tmp_path: Path) -> None:
    path = saved(tmp_path)
    convert(path, tmp_path / "pipe", vae=write_vae(tmp_path / "vae"))
    card = (tmp_path / "pipe" / "README.md").read_text()
    absent = [f"{kind}{i}" for kind in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")]
    assert all(f"{name}=None" in card for name in absent)
    pipeline = load_pipeline(tmp_path / "pipe", **dict.fromkeys(absent))
    pipeline.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(9)
    noise = torch.randn(2, 4, 16, 16, generator=g)
    text, uncond = (TextCond(torch.randn(2, 6, 48, generator=g), torch.randn(2, 24, generator=g)) for _ in range(2))
    theirs = pipeline(
        prompt_embeds=text.context_BLD,
        pooled_prompt_embeds=text.pooled_BP,
        negative_prompt_embeds=uncond.context_BLD,
        negative_pooled_prompt_embeds=uncond.pooled_BP,
        latents=noise.clone(),
        height=32,
        width=32,
        num_inference_steps=10,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    model, _ = load_model(path)
    ours = solve(model, noise, text, uncond, steps=10, guidance=3.0, formulation="rf", grid="released").latents
    assert float((ours - theirs).abs().max()) <= 1e-4
    assert float(ours.std()) > 0.1


@pytest.mark.parametrize("channels", [4, 16])
def test_vae_latents_are_scaled_as_diffusers_does(tmp_path: Path, channels: int) -> None:
    from model.encoders.vae import Latents, load_vae

    vae = load_vae(write_vae(tmp_path / "vae", channels))
    latents = Latents.of(vae.config, "world:vae")
    assert latents == Latents("world:vae", channels=channels, factor=2, shift=0.1, scale=1.5)
    assert from_json(Latents, json.dumps(to_json(latents)), where="vae") == latents
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    moments = latents.encode(vae, images)
    assert moments.dtype == torch.float16
    assert moments.shape == (2, 2 * channels, 16, 16)
    noise = torch.randn(2, channels, 16, 16, generator=torch.Generator().manual_seed(2))
    latent = latents.normalise(latents.sample(moments, noise))
    posterior = vae.encode(images).latent_dist
    torch.testing.assert_close(latent, (posterior.mean + posterior.std * noise - 0.1) * 1.5, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(latents.normalise(latents.denormalise(latent)), latent)
    with torch.no_grad():
        decoded = vae.decode(latent / 1.5 + 0.1).sample.clamp(-1, 1)
    torch.testing.assert_close(latents.decode(vae, latent), decoded)
    with pytest.raises(UserError, match="no autoencoder"):
        load_vae(tmp_path)


def test_exported_pipeline_with_its_encoders_draws_from_prompts(tmp_path: Path) -> None:
    path = saved(tmp_path)
    encoders = write_sd3_encoders(tmp_path / "encoders")
    convert(path, tmp_path / "pipe", vae=write_vae(tmp_path / "vae"), encoders=encoders)
    assert "=None" not in (tmp_path / "pipe" / "README.md").read_text()
    pipeline = load_pipeline(tmp_path / "pipe")
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    asked = {"latents": noise, "num_inference_steps": 10, "guidance_scale": 3.0, "max_sequence_length": 6}
    shapes = {"height": 32, "width": 32}
    image = pipeline("a b", **asked, **shapes, output_type="pt").images
    assert image.shape == (1, 3, 32, 32)
    assert torch.isfinite(image).all()
    # The same latents from the same prompt by our encoders, read from that folder, and our sampler.
    theirs = pipeline("a b", **asked, **shapes, output_type="latent").images
    clip_l = EncoderSpec("clip_l", "text_encoder", "clip_hf", tokens=8, width=16, pooled=10)
    clip_g = EncoderSpec("clip_g", "text_encoder_2", "clip_hf", tokens=8, width=24, pooled=14)
    t5 = EncoderSpec("t5", "text_encoder_3", "t5_hf", tokens=6, width=48, pooled=0)
    spec = TextSpec((clip_l, clip_g, t5), "padded", 48, "diffusers")
    text = load_text_encoders(spec, lambda name: tmp_path / "pipe" / name)
    model, _ = load_model(path)
    ours = solve(
        model, noise, text.condition(["a b"]), text.encode_empty_prompt(1), steps=10, guidance=3.0, formulation="rf",
        grid="released",
    ).latents  # fmt: skip
    assert float((ours - theirs).abs().max()) <= 1e-4
    assert float((ours - noise).std()) > 0.1
