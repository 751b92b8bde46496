"""GenEval's color of a detection and BLIP's yes or no: crops, class heads, formula from known embeddings and logits."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from eval.drawing.pictures import read_picture
from eval.judging.geneval_prompts import COLORS
from eval.metrics.geneval.colors import COLOR_TEMPLATES, ClipColors, crop_masked
from eval.metrics.geneval.rules import KeptDetection
from eval.networks.detectors import Detections
from eval.networks.vqa import BlipVQA, clean_question


def picture(height=6, width=8):
    return np.random.default_rng(0).integers(0, 100, (height, width, 3), dtype=np.uint8)


def box(*corners):
    return np.array([*corners, 0.9], dtype=np.float32)


def test_outside_the_mask_is_grey_and_the_crop_is_the_box():
    image, mask = picture(), np.zeros((6, 8), dtype=bool)
    mask[2:4, 3:5] = True
    found = np.asarray(crop_masked(image, box(2, 1, 6, 5), mask))
    assert found.shape == (4, 4, 3)
    assert (found[1:3, 1:3] == image[2:4, 3:5]).all()
    outside = np.ones((4, 4), dtype=bool)
    outside[1:3, 1:3] = False
    assert (found[outside] == 0x99).all()
    assert (np.asarray(crop_masked(image, box(2, 1, 6, 5), None)) == image[1:5, 2:6]).all()


def test_corners_are_rounded_half_to_even_as_pil_does():
    image, everything = picture(), np.ones((6, 8), dtype=bool)
    for corners in ((0.5, 1.5, 4.5, 4.49), (1.51, 0.49, 6.5, 5.5), (2, 1, 6, 5)):
        expected = np.asarray(Image.fromarray(image).crop(corners))
        assert (np.asarray(crop_masked(image, box(*corners), everything)) == expected).all()
    assert crop_masked(image, box(3.1, 2.1, 3.2, 2.2), everything).size == (1, 1), "a box without pixels keeps one"


def test_pictures_are_turned_upright_before_they_are_judged(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    image = picture()
    Image.fromarray(image).save(tmp_path / "turned.png", exif=exif)
    assert (read_picture(tmp_path / "turned.png") == np.rot90(image, -1)).all()


class KnownClip:
    """Embeddings by words and by the crop's mean level, of any length: what only a network could give."""

    def __init__(self, texts, images):
        self._texts, self._images, self.crops = texts, images, []

    def texts(self, texts):
        return torch.stack([self._texts[text] for text in texts])

    def images(self, crops):
        self.crops += crops
        return self._images[: len(crops)]


def test_the_class_head_is_the_mean_of_unit_templates():
    rng = np.random.default_rng(1)
    prompts = [[t.format(c=color, name="dog") for t in COLOR_TEMPLATES] for color in COLORS]
    assert prompts[0] == ["a photo of a red dog", "a photo of a red-colored dog", "a photo of a red object"]
    # templates of very different length: a mean of raw embeddings would follow the longest
    table_CTE = rng.normal(size=(len(COLORS), 3, 6)) * np.array([1.0, 30.0, 0.1])[None, :, None]
    known = {text: torch.tensor(e) for row, es in zip(prompts, table_CTE) for text, e in zip(row, es)}
    image_NE = rng.normal(size=(20, 6)) * rng.uniform(0.1, 9, size=(20, 1))
    clip = KnownClip(known, torch.tensor(image_NE))
    image = picture()
    detections = Detections(np.tile([1, 1, 5, 5], (20, 1)), np.full(20, 0.9), ("dog",) * 20, np.ones((20, 6, 8), bool))
    found = [KeptDetection(box(1, 1, 5, 5), row) for row in range(20)]
    said = ClipColors(clip).name(image, detections, label="dog", kept=found)
    head_CE = (table_CTE / np.linalg.norm(table_CTE, axis=-1, keepdims=True)).mean(1)
    head_CE /= np.linalg.norm(head_CE, axis=-1, keepdims=True)
    assert said == [COLORS[i] for i in (image_NE @ head_CE.T).argmax(1)]
    assert len(set(said)) > 3
    raw_CE = table_CTE.mean(1) / np.linalg.norm(table_CTE.mean(1), axis=-1, keepdims=True)
    assert said != [COLORS[i] for i in (image_NE @ raw_CE.T).argmax(1)], "the case tells the two apart"
    assert [crop.size for crop in clip.crops] == [(4, 4)] * 20
    assert ClipColors(clip).name(image, detections, label="dog", kept=[]) == [], "a clause may count to 0"


def blip(logits_NV, *, size=4):
    """A BlipVQA whose network answers with these logits; all around the forward pass is our own."""
    asked = []

    def tokens(questions, **_):
        ids = torch.zeros((len(questions), 3), dtype=torch.long)
        found = SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))
        found.to = lambda device: found
        asked.append(found)
        return found

    def seen(pixels, **_):
        return SimpleNamespace(last_hidden_state=torch.zeros(len(pixels), 1, 2))

    def encoded(input_ids, **_):
        return SimpleNamespace(last_hidden_state=torch.zeros(*input_ids.shape, 2))

    model = BlipVQA.__new__(BlipVQA)
    model._model = SimpleNamespace(
        vision_model=seen, text_encoder=encoded, decoder_start_token_id=1,
        text_decoder=lambda input_ids, **_: SimpleNamespace(logits=torch.tensor(logits_NV)[:, None]),
    )  # fmt: skip
    model._tokenizer, model._device, model._size, model._interpolate = tokens, "cpu", size, False
    model._mean_std = torch.tensor([0.5] * 3), torch.tensor([0.25] * 3)
    model._yes, model._no, model._encode_id = 2, 5, 7
    return model, asked


def test_yes_is_its_share_of_yes_and_no_over_the_whole_vocabulary():
    logits_NV = np.random.default_rng(2).normal(size=(3, 9)).astype(np.float32) * 4
    model, asked = blip(logits_NV)
    found = model.yes([picture()] * 3, ["a red dog?"] * 3)
    p_NV = np.exp(logits_NV.astype(float)) / np.exp(logits_NV.astype(float)).sum(1, keepdims=True)
    assert found == pytest.approx(p_NV[:, 2] / (p_NV[:, 2] + p_NV[:, 5]), abs=1e-9)
    assert found.dtype == np.float64
    assert asked[0].input_ids[:, 0].tolist() == [7, 7, 7], "[ENC] opens the question"
    even, _ = blip(np.array([[0, 0, 80, 0, 0, 80, 0, 0, 0], [0, 0, 90, 0, 0, -90, 0, 0, 0]], dtype=np.float32))
    assert even.yes([picture()] * 2, ["a?", "b?"]) == pytest.approx([0.5, 1.0])


def test_questions_are_put_as_blips_own_code_puts_them():
    from data_pipeline.checkpoints import resolve

    assert clean_question('A "Stop" sign (red); 50 cent*s!?') == "a stop sign red 50 cents?"
    assert clean_question("so " * 60 + "?").count("so") == 50
    model, image = BlipVQA(resolve("world:vqa")), picture(64, 64)
    marked, plain, other = model.yes([image] * 3, ['A "red" dog:?', "a red dog?", "a blue kite?"])
    assert marked == pytest.approx(plain, abs=1e-6)
    assert abs(other - plain) > 1e-6


def test_pixels_are_bicubic_and_normalised():
    model, _ = blip(np.zeros((1, 9), dtype=np.float32))
    image = picture()
    sized = np.asarray(Image.fromarray(image).resize((4, 4), Image.Resampling.BICUBIC))
    assert model._pixels([image])[0].permute(1, 2, 0).numpy() == pytest.approx((sized / 255 - 0.5) / 0.25, abs=1e-6)
