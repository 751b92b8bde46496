"""The autoencoder report: SSIM against scikit-image, LPIPS by path, and real autoencoders of 4, 8 and 16 channels."""

import json
import warnings

import numpy as np
import pytest
import torch

from eval.drawing.pictures import write_picture
from eval.networks.perceptual import Lpips
from eval.studies.autoencoder import AutoencoderOptions, measure_autoencoders
from eval.studies.fidelity import psnr, ssim
from infra.errors import UserError
from model.perceptual import load_perceptual


def picture(seed, height=40, width=48):
    smooth = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3)).repeat(8, 0).repeat(8, 1)
    return smooth.astype(np.uint8)


def noisy(image, seed):
    return (image + np.random.default_rng(seed).normal(0, 20, image.shape)).clip(0, 255).astype(np.uint8)


def test_ssim_equals_scikit_image():
    from skimage.metrics import structural_similarity

    a = picture(0)
    b = noisy(a, 1)
    theirs = structural_similarity(
        a, b, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert ssim(a, b) == pytest.approx(theirs, abs=1e-7)
    assert ssim(a, a) == pytest.approx(1)
    with pytest.raises(UserError, match="11 pixels"):
        ssim(a[:8], b[:8])


def test_psnr_of_known_errors():
    a = np.zeros((4, 4, 3), dtype=np.uint8)
    assert psnr(a, a + 255) == pytest.approx(0)
    assert psnr(a, a + 1) == pytest.approx(48.1308, abs=1e-4)
    assert psnr(a, a) == float("inf")


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    """torchvision's file of AlexNet, with random weights."""
    from torchvision.models import alexnet as build

    torch.manual_seed(0)
    state = {k: v for k, v in build(weights=None).state_dict().items() if k.startswith("features")}
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save(state, path)
    return path


def test_lpips_with_a_backbone_by_path(alexnet, tmp_path):
    distance = Lpips(alexnet)
    a = [picture(0, 64, 64), picture(1, 64, 64)]
    b = [a[0], noisy(a[1], 2)]
    near, far = distance.distances(a, b)
    assert near == 0
    assert far > 0
    assert distance.distances(b, a)[1] == pytest.approx(far)
    given = torch.load(alexnet, weights_only=True)
    assert torch.equal(distance._model.net.state_dict()["slice2.3.weight"], given["features.3.weight"])
    with pytest.raises(UserError, match="wrong backbone weights"):
        Lpips(alexnet, net="vgg")
    (tmp_path / "torn.pth").write_bytes(b"torn")
    with pytest.raises(UserError, match="not backbone weights"):
        Lpips(tmp_path / "torn.pth")


def test_lpips_as_a_loss_is_the_package_s_own_at_224_pixels(alexnet):
    """Written once more with the package; a gradient goes to the pictures alone."""
    import lpips

    distance = load_perceptual("lpips-alex", alexnet)
    a, b = (torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(n)) * 2 - 1 for n in (0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torchvision, at how lpips calls it
        theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    given = torch.load(alexnet, weights_only=True)
    theirs.net.load_state_dict({k: given["features." + k.split(".", 1)[1]] for k in theirs.net.state_dict()})
    resized = [torch.nn.functional.interpolate(x, size=(224, 224), mode="bilinear", antialias=True) for x in (a, b)]
    with torch.no_grad():
        expected = theirs(*resized).view(-1)
    a.requires_grad_()
    found = distance(a, b)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert a.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    assert distance(b, b).abs().max() == 0


def autoencoder(folder, channels):
    from diffusers import AutoencoderKL

    torch.manual_seed(channels)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    vae.save_pretrained(folder)
    return str(folder)


def test_the_report_of_autoencoders_with_4_8_and_16_channels(tmp_path, capsys, alexnet):
    folders = [autoencoder(tmp_path / f"c{n}", n) for n in (4, 16)]
    measure_autoencoders(
        AutoencoderOptions(
            vae=(folders[0], "world:vae", folders[1]), count=6, batch=4, lpips=str(alexnet), out=str(tmp_path / "out")
        )
    )
    printed = capsys.readouterr().out
    assert printed.count("| SD3, Table 3 (other pictures) |") == 3
    found = json.loads((tmp_path / "out" / "autoencoder.json").read_text())
    by_channels = {f["channels"]: f for f in found["autoencoders"]}
    assert list(by_channels) == [4, 8, 16]
    world, untrained = by_channels[8]["values"], by_channels[4]["values"]
    assert 28 < world["psnr"][0] < 34, "the model card says 30.6"
    assert world["psnr"][1] < world["psnr"][0] < world["psnr"][2]
    for name, better in (("psnr", 1), ("ssim", 1), ("rfid", -1)):
        assert better * (world[name][0] - untrained[name][0]) > 0, name
    assert found["protocol"]["features"][0] == "judge_clip"
    assert (tmp_path / "out" / "autoencoder.md").read_text() == f"# Autoencoders\n\n{printed}"


def test_pictures_of_any_size_are_cut_to_whole_latent_pixels(tmp_path, capsys):
    for index, size in enumerate([(45, 61), (64, 50), (45, 61)]):
        write_picture(tmp_path / "p" / f"{index}.png", picture(index, 64, 64)[: size[0], : size[1]])
    measure_autoencoders(AutoencoderOptions(images=str(tmp_path / "p"), count=3, batch=2))
    printed = capsys.readouterr()
    assert "not measured" in printed.out
    assert "LPIPS was left out" in printed.err
    measure_autoencoders(AutoencoderOptions(images=str(tmp_path / "p"), count=3, size=32))
    with pytest.raises(UserError, match="holds 3 pictures, --count asks for 9"):
        measure_autoencoders(AutoencoderOptions(images=str(tmp_path / "p"), count=9))
    with pytest.raises(UserError, match="missing"):
        measure_autoencoders(AutoencoderOptions(vae=(str(tmp_path / "missing"),), count=2))
    with pytest.raises(UserError, match="--count 2 or more"):
        measure_autoencoders(AutoencoderOptions(count=1))
    for size in (0, -5, 10):
        with pytest.raises(UserError, match="--size must be 11 or more"):
            measure_autoencoders(AutoencoderOptions(count=2, size=size))
    with pytest.raises(UserError, match="unknown --device 'cudaa'"):
        measure_autoencoders(AutoencoderOptions(count=2, device="cudaa"))
