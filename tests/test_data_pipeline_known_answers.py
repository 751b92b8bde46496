"""Fingerprints as the first release computed them: a changed one would rebuild every column of an existing dataset."""

from dataclasses import replace

import pytest

from data_pipeline.curation.filters import NO_LIMITS, Thresholds
from data_pipeline.formats.schema import hash_encoding
from data_pipeline.plans import build_columns, read_vae_meta, world

WORLD = {
    "ingest": "ed2d09849bdd2a74",
    "measure": "184650a71e680234",
    "filter": "94a8ad3961902f56",
    "signature": "efb7fd64ceb6a577",
    "bucket": "d5ce48ab16c4e945",
    "dedup": "2b0c84cddd23bd6f",
    "caption": "d4c1779e2680acc4",
    "latents": "773d6a9d564bfca0",
    "text_clip_l": "48e1d9619b72cdad",
    "text_t5": "a73b1768200149d9",
}
EVERY_STAGE = {
    "ingest": "ed2d09849bdd2a74",
    "measure": "184650a71e680234",
    "nsfw": "792c75d44ead5882",
    "caption_quality": "914af5c18dd5f08c",
    "embed": "fd4ed06e1a3b9b83",
    "filter": "821ed5fdf31084fb",
    "signature": "f91c068b8439a262",
    "bucket": "ea5ed3e894b10483",
    "dedup": "8821a94ae5ab754d",
    "caption": "09d0abac35be6e71",
    "latents": "d97a66b799ff5910",
    "text_clip_l": "5a5fb7bc07aa564c",
    "text_t5": "e2782df70913f6cf",
}
OTHERWISE = replace(
    world(), nsfw="opennsfw", strict=Thresholds(max_nsfw=0.3, min_caption_quality=0.2),
    gate=replace(NO_LIMITS, max_nsfw=0.5, min_caption_quality=0.1),
    dedup_distance=4, dedup_embedding="world:clip", dedup_similarity=0.8, dedup_verify=15, bucket_aspect=2.0,
    text_storage="int8", text_layout="padded", text_tokens=12,
    captioner=replace(world().captioner, prompt="a photo of", num_beams=2),
)  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "columns", "encoding"),
    [(world(), WORLD, "c38aefb5e7b748d4"), (OTHERWISE, EVERY_STAGE, "b04c6ca49d8d83f7")],
    ids=["world", "every stage"],
)
def test_fingerprints_of_columns_and_encoding_stay_as_they_are(plan, columns, encoding):
    plan = plan.settle()
    found = build_columns(plan, "root").fingerprints
    assert found == columns
    vae, captions = read_vae_meta(plan.vae), ("original", "synthetic")
    made = hash_encoding(plan.text_spec, vae, plan.resolution, captions, found, plan.int8_seats)
    assert made == encoding
