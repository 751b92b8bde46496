"""The pipeline's tiny checkpoints load by the production calls and do what their cards say, with some room."""

from pathlib import Path

import pytest
import torch

from data_pipeline.checkpoints import WORLD, WORLD_NAMES, resolve
from data_pipeline.world.training.cards import Figure, read_training_line, write_card
from data_pipeline.world.training.fit import Muon, fit, orthogonalise
from infra.errors import UserError

NUM_SCENES = 200


def test_autoencoder_reconstructs_held_out_scenes() -> None:
    from diffusers import AutoencoderKL

    from data_pipeline.world.training.train_vae import make_held_out, measure

    vae = AutoencoderKL.from_pretrained(resolve("world:vae"))
    figures = measure(vae, num_scenes=50)
    assert figures["psnr"] >= 29.5
    assert figures["psnr_of_mean_error"] >= 29
    with torch.no_grad():
        latent_BCHW = vae.encode(make_held_out(1, 0, 50, seen=True)).latent_dist.sample(
            torch.Generator().manual_seed(0)
        )
    assert latent_BCHW.shape[1:] == (8, 16, 16)
    normal_BCHW = (latent_BCHW - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(float(normal_BCHW.mean())) < 0.05
    assert abs(float(normal_BCHW.std()) - 1) < 0.05


def test_clip_retrieves_held_out_scenes() -> None:
    import open_clip

    from data_pipeline.world.training.train_clip import measure

    path = f"local-dir:{resolve('world:clip')}"
    model, _, preprocess = open_clip.create_model_and_transforms(path)
    tokenizer = open_clip.get_tokenizer(path)
    figures = measure(model.eval(), tokenizer, num_scenes=NUM_SCENES)
    assert min(value for name, value in figures.items() if name.endswith("r@1")) >= 0.85
    assert min(value for name, value in figures.items() if name.endswith("r@5")) >= 0.95
    ids_BL = tokenizer(["a photo of a dog", "A  DOG", "Gr\u00fc\u00df dich \U0001f642 " * 20])
    assert ids_BL.shape == (3, 16)
    assert (ids_BL.argmax(1) == torch.tensor([6, 3, 15])).all(), "the end token has the highest id"
    assert preprocess is not None


def test_captioner_says_what_it_sees() -> None:
    from data_pipeline.world.training.train_captioner import load, measure, write_captions

    model, images, tokenizer = load(resolve("world:captioner"))
    figures = measure(model, tokenizer, num_scenes=NUM_SCENES)
    assert min(value for name, value in figures.items() if name.endswith("/seen")) >= 0.93
    from PIL import Image

    from data_pipeline.images import stack_pixels
    from data_pipeline.world.scenes import make_scene

    scene = make_scene(0, 0, split="captioner_val_seen")
    pixels_BCHW = images(images=[Image.fromarray(scene.image)], return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels_BCHW, stack_pixels([scene.image]), atol=1e-5, rtol=0)
    assert write_captions(model, tokenizer, [scene.image])[0].isascii()


def test_facets_of_captions_are_told_apart() -> None:
    from data_pipeline.world.training.train_captioner import parse_facets

    one = parse_facets("three red buses, two at the top and one at the bottom")
    assert one["objects"] == [("bus",)]
    assert one["counts"] == [("three", "bus")]
    assert one["colors"] == [("red", "bus")]
    assert one["positions"][1:] == [("two", "at the top"), ("one", "at the bottom")]
    two = parse_facets("red teddy bear on the left and gray cup on the right")
    assert two["colors"] == [("gray", "cup"), ("red", "teddy bear")]
    assert two["positions"] == [("teddy bear", "on the left"), ("cup", "on the right")]
    assert parse_facets("red teddy bear on the right and gray cup on the left")["positions"] != two["positions"]


def test_the_networks_of_the_pipeline_and_the_model_stay_within_twenty_megabytes_each() -> None:
    files = [path for path in WORLD.rglob("*") if path.is_file()]
    model = sum(path.stat().st_size for path in files if path.parent.name == "d4")
    assert model <= 20 * 1000 * 1000
    assert sum(path.stat().st_size for path in files) - model <= 20 * 1000 * 1000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".txt"}
    for name in set(WORLD_NAMES) - {"minilm"}:
        card = (WORLD / name / "README.md").read_text(encoding="utf-8")
        assert "CC BY-SA 4.0" in card, name


def test_names_resolve_or_are_refused(tmp_path: Path) -> None:
    assert (resolve("world:minilm") / "model.safetensors").is_file()
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match=r"world:vaee.*did you mean 'vae'"):
        resolve("world:vaee")
    with pytest.raises(UserError, match="no checkpoint at '/nowhere'"):
        resolve("/nowhere")


def test_muon_makes_steps_of_adamws_size() -> None:
    matrix = torch.randn(24, 60, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalise(matrix))
    assert float(singular.min()) > 0.6
    assert float(singular.max()) < 1.3
    weight = torch.nn.Parameter(torch.zeros(24, 60))
    weight.grad = matrix
    Muon([weight], lr=0.1).step()
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.02, rel=0.25)


def test_fit_learns_and_stops_at_nonsense() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    x_BD = torch.randn(64, 8)
    y_B1 = x_BD[:, :1] * x_BD[:, 1:2]

    def loss_of_step(step: int) -> torch.Tensor:
        return (module(x_BD) - y_B1).square().mean()

    before = loss_of_step(0).item()
    average, steps = fit(module, loss_of_step, minutes=0.05, muon_lr=0.05)
    assert steps > 0
    assert (average(x_BD) - y_B1).square().mean().item() < before
    with pytest.raises(FloatingPointError, match="step 0"):
        fit(module, lambda step: loss_of_step(step) * float("nan"), minutes=0.05, muon_lr=0.05)


def test_a_continued_training_says_so(tmp_path: Path) -> None:
    figures = [Figure("PSNR", 31.25, "dB"), Figure("r@1", 0.5, "")]
    write_card(tmp_path, title="T", what="W", load="L", trained="`first`: 10 steps", scored="S", figures=figures)
    assert read_training_line(tmp_path) == "`first`: 10 steps; then "
    assert read_training_line(None) == ""
    assert "| PSNR | 31.25 dB |\n| r@1 | 0.5 |\n" in (tmp_path / "README.md").read_text()
