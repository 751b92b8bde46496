"""Text states in int8 with a scale per token: how near they stay, how many bytes they save, that nothing mixes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from data_pipeline.flow.pipeline import Pipeline
from data_pipeline.formats.layout import SampleLayout, quantise_tokens
from data_pipeline.inspection.verify import verify_dataset
from data_pipeline.loading.loader import open_dataset
from data_pipeline.packing.synthetic import CAPTIONS, TINY_TEXT, write_synthetic
from data_pipeline.plans import build_columns, world
from data_pipeline.sources.registry import open_source
from data_pipeline.world.write import write_world
from infra.errors import UserError
from infra.runner import WorkerPool
from model.encoders.text import EncoderSpec, TextSpec

PAPER_KB = 65.5 + 121.3 + 202.2 + 630.8  # SD3's Table 7: autoencoder, CLIP-L, CLIP-G and T5 of one caption


def sd3_layout(int8_seats: tuple[str, ...]) -> SampleLayout:
    """SD3's encoders at 256 pixels."""
    encoders = (
        EncoderSpec("clip_l", "x", "clip_hf", tokens=77, width=768, pooled=768),
        EncoderSpec("clip_g", "x", "clip_hf", tokens=77, width=1280, pooled=1280),
        EncoderSpec("t5", "x", "t5_hf", tokens=77, width=4096, pooled=0),
    )
    return SampleLayout(TextSpec(encoders, "trimmed", 4096), ("original",), (32, 32, 32), int8_seats)


def kilobytes(tokens: int, int8_seats: tuple[str, ...]) -> float:
    return float(sd3_layout(int8_seats).offsets(np.array([[tokens] * 3])).size_R[0]) / 1000


def test_bytes_per_sample_against_the_paper():
    """The table of the README."""
    small = {"fp16": (), "t5": ("t5",), "all": ("clip_l", "clip_g", "t5")}
    table = {name: [kilobytes(n, seats) / PAPER_KB for n in (20, 40, 77)] for name, seats in small.items()}
    assert table["fp16"] == pytest.approx([0.313, 0.555, 1.0], abs=0.003)
    assert table["t5"] == pytest.approx([0.233, 0.394, 0.691], abs=0.003)
    assert table["all"] == pytest.approx([0.193, 0.314, 0.538], abs=0.003)
    assert table["all"][1] <= 0.32


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.floats(1e-6, 1e4), st.integers(0, 2**31))
def test_no_value_moves_by_more_than_half_a_step_of_its_token(tokens, width, size, seed):
    hidden_LW = np.random.default_rng(seed).normal(size=(tokens, width)).astype(np.float32) * size
    hidden_LW[0] = 0
    q_LW, scale_L = quantise_tokens(hidden_LW)
    assert (q_LW.dtype, scale_L.dtype, q_LW[0].any()) == (np.int8, np.float32, False)
    error = np.abs(q_LW * scale_L[:, None] - hidden_LW).max(1)
    assert (error <= np.abs(hidden_LW).max(1) / 127 * 0.5001).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_offsets_are_those_of_the_file(data):
    seats = data.draw(st.sampled_from([(), ("t5",), ("clip_l",), ("clip_l", "t5")]))
    layout = SampleLayout(TINY_TEXT, CAPTIONS, (4, 2, 2), seats)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    text = {}
    for caption, encoder in layout.slots:
        if caption == "original" or data.draw(st.booleans()):
            length = data.draw(st.integers(1, encoder.tokens))
            text[caption, encoder.seat] = rng.normal(size=(length, encoder.width)), rng.normal(size=encoder.pooled)
    raw, header, tokens = layout.encode(rng.normal(size=(4, 2, 2)), text)
    arrays, body = load(raw), raw[header:]
    slots = layout.offsets(np.array([tokens]))
    assert slots.size_R[0] == len(body)
    at = slots.moments_R[0]
    assert body[at : at + 32] == arrays["moments"].tobytes()
    for number, (caption, encoder) in enumerate(layout.slots):
        for what, at in (("hidden", slots.hidden_RS[0, number]), ("scale", slots.scale_RS[0, number])):
            stored = arrays.get(f"{caption}.{encoder.seat}.{what}")
            assert (at >= 0) == (stored is not None)
            if stored is not None:
                assert body[at : at + stored.nbytes] == stored.tobytes()


def test_odd_widths_are_refused_where_they_would_misalign():
    odd = replace(TINY_TEXT, encoders=(replace(TINY_TEXT.encoders[0], width=31), TINY_TEXT.encoders[1]))
    SampleLayout(odd, CAPTIONS, (4, 2, 2))
    with pytest.raises(ValueError, match="odd width"):
        SampleLayout(odd, CAPTIONS, (4, 2, 2), ("clip_l",))


@pytest.mark.parametrize("seats", [("t5",), ("clip_l", "t5")])
def test_batches_hold_nearly_the_states_of_fp16(tmp_path, seats):
    for name, int8 in (("fp16", ()), ("int8", seats)):
        write_synthetic(str(tmp_path / name), num_samples=32, val_samples=8, int8_seats=int8)
    full, small = (open_dataset(str(tmp_path / name)) for name in ("fp16", "int8"))
    assert small.fingerprint != full.fingerprint
    one, two = (next(data.batches(seed=0, global_batch=16)) for data in (full, small))
    clip, t5 = slice(0, 8), slice(8, 16)
    for part, seat in ((clip, "clip_l"), (t5, "t5")):
        a, b = one.text.context_BLD[:, part], two.text.context_BLD[:, part]
        assert torch.equal(a, b) == (seat not in seats)
        assert (a - b).abs().max() <= a.abs().max() / 127
    assert (one.text.context_BLD.dtype, two.text.context_BLD.dtype) == (torch.float16, torch.float32)
    assert torch.equal(one.text.pooled_BP, two.text.pooled_BP)
    assert torch.equal(one.latent_BCHW, two.latent_BCHW)
    assert verify_dataset(str(tmp_path / "int8")).problems == []


def test_the_flow_stores_int8_and_rebuilds_text_alone(tmp_path):
    write_world(str(tmp_path / "raw"), images=12, val_images=4, seed=2)
    plan = replace(world(), ingest_rows=8, pack_rows=8)

    def run(storage: str, *rebuild: str):
        made = Pipeline(
            replace(plan, text_storage=storage), str(tmp_path / "data"), open_source(f"wds:{tmp_path}/raw"),
            workers=WorkerPool(0), rebuild=rebuild,
        ).run()  # fmt: skip
        return made, open_dataset(str(tmp_path / "data"), split="val").read(range(4), posterior="mean")

    first, full = run("fp16")
    second, small = run("t5-int8", "text_t5")
    changed = {k for k, v in second.info.columns.items() if first.info.columns[k] != v}
    assert changed == {"text_t5"}
    assert second.computed.keys() == {"caption + latents + text_clip_l + text_t5", "pack"}
    assert torch.equal(full.latent_BCHW, small.latent_BCHW)
    assert not torch.equal(full.text.context_BLD, small.text.context_BLD)
    distance = (full.text.context_BLD - small.text.context_BLD).norm() / full.text.context_BLD.float().norm()
    assert distance < 0.01
    assert verify_dataset(str(tmp_path / "data")).problems == []
    # a shard of the other storage is refused by name
    info = (tmp_path / "data" / "dataset.json").read_text()
    (tmp_path / "data" / "dataset.json").write_text(info.replace('"int8_seats": [\n  "t5"\n ]', '"int8_seats": []'))
    with pytest.raises(UserError, match="rebuild the columns latents and text"):
        open_dataset(str(tmp_path / "data"))


def test_the_storage_is_part_of_each_encoders_fingerprint():
    made = {s: build_columns(replace(world(), text_storage=s), "").fingerprints for s in ("fp16", "t5-int8", "int8")}
    assert made["fp16"]["text_clip_l"] == made["t5-int8"]["text_clip_l"] != made["int8"]["text_clip_l"]
    assert made["fp16"]["text_t5"] != made["t5-int8"]["text_t5"] == made["int8"]["text_t5"]
