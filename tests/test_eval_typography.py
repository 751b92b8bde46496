"""Typography: which words a prompt asks for, character errors, and real OCR of drawn words."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from eval.judging.judges import build_judges
from eval.judging.metric import JudgedImage, Prompt
from eval.judging.official import OfficialPaths
from eval.judging.written_words import find_quoted_words, list_typography_prompts, normalize_text
from eval.metrics.typography import Typography, character_errors, load_ocr
from infra.errors import UserError


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ('a sign that says "Hello World"', "Hello World"),
        ("a cat's sign that says 'no dogs'", "no dogs"),
        ('"one" and below it "two"', "one two"),
        ("a sign that says \u201copen\u201d", "open"),
        ("a dog", ""),
    ],
)
def test_the_words_that_a_prompt_quotes(prompt, words):
    assert find_quoted_words(prompt) == words


def test_only_letters_and_digits_are_compared():
    assert normalize_text("  Two-for_one,\n 50% OFF! ") == "twoforone 50 off"


@pytest.mark.parametrize(
    ("wanted", "found", "rate"),
    [
        ("hello", "hello", 0),
        ("hello", "", 1),
        ("hello", "helo", 0.2),
        ("hello", "jello", 0.2),
        ("kitten", "sitting", 3 / 6),
        ("hi", "something else entirely", 1),
        ("", "", 0),
        ("", "x", 1),
    ],
)
def test_character_errors(wanted, found, rate):
    assert character_errors(wanted, found) == pytest.approx(rate)


def written(*lines):
    picture = Image.new("RGB", (256, 256), "white")
    for number, line in enumerate(lines):
        ImageDraw.Draw(picture).text((24, 40 + 80 * number), line, fill="black", font=ImageFont.load_default(36))
    return np.asarray(picture)


def test_drawn_words_are_read_and_scored_by_prompt():
    metric = Typography(build_judges("world"))
    prompts = [Prompt('a sign that says "fresh bread"', "typography"), Prompt('a poster with "MUSIC"', "typography")]
    pictures = [(0, written("FRESH", "BREAD")), (0, written("FRESH")), (1, np.full((256, 256, 3), 128, dtype=np.uint8))]
    metric.update([JudgedImage(prompts[index], index, picture) for index, picture in pictures])
    scores = {score.path: score for score in metric.compute()}
    assert scores["exact_match"].value == pytest.approx(1 / 3)
    assert scores["exact_match"].higher_is_better is True
    assert scores["character_error_rate"].value == pytest.approx((0 + 6 / 11 + 1) / 3)
    assert scores["character_error_rate"].higher_is_better is False
    assert scores["exact_match"].sample_count == 3
    assert metric.describe()["ocr"][0] == "rapidocr"
    small = np.asarray(Image.fromarray(written("OPEN")).resize((64, 64), Image.Resampling.BOX))
    assert "OPEN" in load_ocr().read([small])[0], "64 pixels are enlarged first"


def test_our_prompts_quote_words_and_differ():
    prompts = list_typography_prompts(80)
    assert len({p.text for p in prompts}) == len(prompts) == 80
    assert all(find_quoted_words(p.text) for p in prompts)
    assert len({find_quoted_words(p.text) for p in prompts[:16]}) == 16, "the first ones mix words"


def test_prompts_from_a_file_must_quote_words(tmp_path):
    (tmp_path / "good.txt").write_text('a sign "A"\na sign "B"\n')
    metric = Typography(build_judges("official", OfficialPaths(typography=str(tmp_path / "good.txt"))))
    assert [p.text for p in metric.prompts(5)] == ['a sign "A"', 'a sign "B"']
    (tmp_path / "bad.txt").write_text("a sign\n")
    with pytest.raises(UserError, match="quotes no words"):
        Typography(build_judges("official", OfficialPaths(typography=str(tmp_path / "bad.txt")))).prompts(5)
