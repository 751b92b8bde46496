"""Plans: everything that decides what a dataset will hold. A plan is a function that returns a frozen dataclass."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated

import tyro

from data_pipeline.buckets import BucketStage, bucket_table
from data_pipeline.caption import CaptionStage
from data_pipeline.captioners import CaptionerSpec, check_captioner
from data_pipeline.checkpoints import resolve
from data_pipeline.columns import Column
from data_pipeline.dedup import Dedup, SignatureStage
from data_pipeline.encode import LatentStage, TextStage
from data_pipeline.filters import FilterStage, MeasureStage
from data_pipeline.ingest import Ingest
from data_pipeline.schema import VaeMeta, fingerprint
from data_pipeline.stage import Stage, stage_fingerprint
from data_pipeline.weights import weights_hash
from infra.errors import UserError, nearest
from model.text import EncoderSpec, TextSpec
from model.vae import Latents


@dataclass(frozen=True)
class Plan:
    """What a dataset is made of. Field comments are the command line's help."""

    name: Annotated[str, tyro.conf.Suppress]
    text_spec: Annotated[TextSpec, tyro.conf.Suppress]
    resolution: int
    """Pixels on the side of a square image; other aspect buckets get the same area."""
    vae: str
    """Autoencoder: world:vae or a diffusers folder."""
    captioner: CaptionerSpec
    bucket_step: int
    """Sides of buckets are multiples of this (autoencoder factor times patch size)."""
    bucket_aspect: float = 1.0
    """Most elongated bucket, as long side over short side; 1 crops everything square."""
    min_side: int = 32
    """Images with a shorter side are set aside as too_small."""
    max_aspect: float = 3.0
    """More elongated images are set aside as aspect."""
    max_caption_chars: int = 5000
    """Longer captions are set aside as bad_caption."""
    dedup_distance: int | None = None
    """Perceptual hashes this many bits apart count as duplicates; None compares exact pixels only."""
    val_fraction: float = 0.02
    """Share of rows for validation where the source has no train/ and val/ of its own."""
    ingest_rows: int = 1000
    """Rows of a canonical shard: the unit of work, and of loss when a worker dies."""
    pack_rows: int = 1000
    """Samples of a training shard."""
    batch: int = 64
    """Images per forward pass of captioner and autoencoder."""


WORLD_TEXT = TextSpec(
    encoders=(
        EncoderSpec("clip_l", "world:clip", "open_clip", tokens=16, width=128, pooled=128),
        EncoderSpec("t5", "world:minilm", "bert_hf", tokens=16, width=384, pooled=0),
    ),
    layout="trimmed",
    context_width=384,
)


def world() -> Plan:
    """The embedded world and its tiny networks; also for a first try on one's own images (64 x 64 pixels)."""
    return Plan(
        name="world",
        resolution=64,
        bucket_step=8,
        vae="world:vae",
        text_spec=WORLD_TEXT,
        captioner=CaptionerSpec("transformers", "world:captioner"),
        ingest_rows=250,
        pack_rows=500,
    )


PLANS: dict[str, Callable[[], Plan]] = {"world": world}


def get_plan(name: str) -> Plan:
    """The plan of that name; an unknown one is refused with the nearest known."""
    if name not in PLANS:
        raise UserError(f"unknown plan {name!r}{nearest(name, PLANS)}: one of {', '.join(PLANS)}")
    return PLANS[name]()


@dataclass(frozen=True)
class Columns:
    """The stages of a plan and the column that each writes."""

    ingest: tuple[Ingest, Column]
    light: tuple[tuple[Stage, Column], ...]
    dedup: tuple[Dedup, Column]
    heavy: tuple[tuple[Stage, Column], ...]

    @property
    def fingerprints(self) -> dict[str, str]:
        pairs = (self.ingest, *self.light, self.dedup, *self.heavy)
        return {column.stage: column.fingerprint for _, column in pairs}


def build_columns(plan: Plan, root: str, *, device: str = "cpu") -> Columns:
    """Stages with their fingerprints; UserError for a checkpoint that is not there."""
    check_captioner(plan.captioner.name)
    made: dict[str, str] = {}

    def column(stage: Stage | Dedup) -> tuple:
        made[stage.name] = stage_fingerprint(stage, made)  # type: ignore[arg-type]
        return stage, Column(root, stage.name, made[stage.name])

    ingest = Ingest(plan.ingest_rows)
    made["ingest"] = fingerprint(["ingest", ingest.identity()])
    light = (
        column(MeasureStage()),
        column(FilterStage(plan.min_side, plan.max_aspect, plan.max_caption_chars)),
        column(SignatureStage(perceptual=plan.dedup_distance is not None)),
        column(BucketStage(bucket_table(plan.resolution, step=plan.bucket_step, max_aspect=plan.bucket_aspect))),
    )
    dedup = column(Dedup(plan.dedup_distance))
    heavy = [
        column(CaptionStage(plan.captioner, _hash(plan.captioner.checkpoint), plan.batch, device)),
        column(LatentStage(plan.vae, _hash(plan.vae), plan.batch, device)),
    ]
    for encoder in plan.text_spec.encoders:
        heavy.append(column(TextStage(plan.text_spec, encoder.seat, _hash(encoder.checkpoint), device=device)))
    return Columns((ingest, Column(root, "ingest", made["ingest"])), light, dedup, tuple(heavy))


def vae_meta(checkpoint: str) -> VaeMeta:
    """Shape and scaling of an autoencoder, from its config.json alone: the driver needs no network."""
    path = resolve(checkpoint) / "config.json"
    if not path.is_file():
        raise UserError(f"no autoencoder at {path.parent}: expected a diffusers folder with config.json and weights")
    defaults = {"shift_factor": None, "latent_channels": 4, "scaling_factor": 0.18215}  # those of AutoencoderKL
    config = SimpleNamespace(**(defaults | json.loads(path.read_text())))
    return VaeMeta(**Latents.of(SimpleNamespace(config=config)).to_json(checkpoint))


def _hash(checkpoint: str) -> str:
    return weights_hash(resolve(checkpoint))
