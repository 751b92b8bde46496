"""One reader of pictures: what metrics compare is what the pipeline trains on."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_pipeline.images import decode
from eval.drawing.pictures import read_picture
from infra.errors import UserError

TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # orientation 6


def variants(rgb: np.ndarray) -> dict[str, tuple[Image.Image, dict]]:
    gray = rgb.mean(axis=2)
    alpha = np.dstack([rgb, np.where(np.arange(rgb.shape[1]) % 2, 255, 0)[None].repeat(len(rgb), 0).astype(np.uint8)])
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return {
        "8 bit": (Image.fromarray(rgb), {"icc_profile": srgb}),
        "16 bit": (Image.fromarray((gray * 257).astype(np.uint16)), {}),
        "transparent": (Image.fromarray(alpha), {}),
        "palette": (Image.fromarray(rgb).quantize(16), {}),
        "turned": (Image.fromarray(rgb), {"exif": TURNED}),
    }


@pytest.mark.parametrize("name", ["8 bit", "16 bit", "transparent", "palette", "turned"])
def test_eval_reads_a_picture_as_the_pipeline_does(tmp_path, name):
    rgb = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    image, options = variants(rgb)[name]
    image.save(tmp_path / "a.png", **options)
    found = read_picture(tmp_path / "a.png")
    assert (found == np.asarray(decode(io.BytesIO((tmp_path / "a.png").read_bytes())))).all()
    expected = {"16 bit": rgb.mean(axis=2).round()[..., None].repeat(3, 2), "8 bit": rgb}.get(name)
    if expected is not None:
        assert np.abs(found - expected).max() <= 1
    if name == "transparent":
        assert (found[:, ::2] == 255).all()
    if name == "turned":
        assert found.shape == (40, 24, 3)


def test_deep_and_plain_pictures_of_the_same_scene_have_no_distance(tmp_path):
    """A gray scene saved in 8 and in 16 bits is the same to every metric."""
    gray = np.random.default_rng(1).integers(0, 256, (24, 24)).astype(np.uint16)
    Image.fromarray(gray.astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray(gray * 257).save(tmp_path / "16.png")
    assert (read_picture(tmp_path / "8.png") == read_picture(tmp_path / "16.png")).all()


def test_a_deep_depth_picture_is_scaled_and_not_clipped(tmp_path):
    from eval.metrics.compbench.stored import _read_depth

    gray = np.random.default_rng(1).integers(0, 256, (24, 24)).astype(np.uint16)
    Image.fromarray(gray.astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray(gray * 257).save(tmp_path / "16.png")
    assert (_read_depth(tmp_path / "8.png") == _read_depth(tmp_path / "16.png")).all()


def test_a_bad_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"a\.png"):
        read_picture(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"gone\.png"):
        read_picture(tmp_path / "gone.png")
