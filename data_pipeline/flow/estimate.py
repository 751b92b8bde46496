"""What a data set will take before anything is paid for: objects, bytes, requests, dollars, GPU-hours.

`python -m data_pipeline estimate --images 1e9`. Every assumption is an option; infra/docs/one_billion_images.md
discusses the result.
"""

from dataclasses import dataclass

# SD3, Table 7: milliseconds per sample of the autoencoder and of the three text encoders
VAE_MS, TEXT_MS = 2.45, (0.45, 2.77, 17.46)
LIGHT_COLUMNS = ("ingest", "measure", "nsfw", "caption_quality", "embed", "filter", "signature", "bucket")
# dollars (list prices, from memory) for a thousand writes, a thousand reads, a gigabyte and month
PUT_1000, GET_1000, GB_MONTH = 0.005, 0.0004, 0.023
HEAVY_COLUMNS = ("caption", "latents", "text_clip_l", "text_clip_g", "text_t5")


@dataclass(frozen=True)
class ScaleAssumptions:
    """The assumptions: SD3's encoders at 256 pixels."""

    images: float = 1e9
    """Rows of the source."""
    raw_kb: float = 60
    """Kilobytes of an image file."""
    past_gate: float = 0.7
    """Share that gets captions and latents."""
    packed: float = 0.6
    """Share that becomes training samples."""
    shard_rows: int = 1000
    """Rows of a canonical and of a training shard."""
    captions: int = 2
    """Captions of an image: the original and the synthetic ones."""
    tokens: int = 40
    """Text tokens stored per caption and encoder (trimmed layout)."""
    text_storage: str = "fp16"
    """fp16, t5-int8 or int8."""
    caption_s: float = 2.5
    """GPU-seconds of the captioner per image, one image at a time."""
    batching: float = 1.0
    """How many times faster the captioner is in batches: measure it, memory bandwidth decides."""
    gpu_hour: float = 2.0
    """Dollars per GPU-hour."""


@dataclass(frozen=True)
class EstimateLine:
    """One figure and how it comes about."""

    what: str
    value: float
    unit: str
    how: str


def compute_sample_kilobytes(scale: ScaleAssumptions) -> tuple[float, float]:
    """(moments, text of one caption)."""
    import numpy as np

    from data_pipeline.formats.layout import SampleLayout
    from data_pipeline.plans import SD3_TEXT

    seats: tuple[str, ...] = {"fp16": (), "t5-int8": ("t5",), "int8": ("clip_l", "clip_g", "t5")}[scale.text_storage]
    layout = SampleLayout(SD3_TEXT, ("original",), (32, 32, 32), seats)
    full = float(layout.offsets(np.full((1, 3), scale.tokens)).size_R[0]) / 1000
    moments = 2 * 16 * 32 * 32 * 2 / 1000
    return moments, full - moments


def estimate_costs(scale: ScaleAssumptions) -> list[EstimateLine]:
    """Top to bottom as the data flows."""
    moments_kb, text_kb = compute_sample_kilobytes(scale)
    gated, packed = scale.images * scale.past_gate, scale.images * scale.packed
    shards, outputs = scale.images / scale.shard_rows, packed / scale.shard_rows
    # each further synthetic caption has a column of its own, and one per text encoder
    heavy = len(HEAVY_COLUMNS) + (len(HEAVY_COLUMNS) - 1) * (scale.captions - 2)
    columns = len(LIGHT_COLUMNS) + heavy
    objects = 2 * columns * shards + 3 * outputs
    sample_kb = moments_kb + scale.captions * text_kb
    raw_tb, columns_tb, packed_tb = (
        rows * kb / 1e9 for rows, kb in ((scale.images, scale.raw_kb), (gated, sample_kb), (packed, sample_kb))
    )
    stored_tb = 2 * raw_tb + columns_tb + packed_tb
    reads = shards * (1 + columns) + outputs * heavy * 2 + columns * shards
    caption_h = gated * (scale.captions - 1) * scale.caption_s / scale.batching / 3600
    several = f"{scale.captions - 1} captions of " if scale.captions > 2 else ""
    caption_how = f"{several}{scale.caption_s:g} s, batches {scale.batching:g} times faster"
    encode_ms = VAE_MS + scale.captions * sum(TEXT_MS)
    encode_h = gated * encode_ms / 1000 / 3600
    number = "two" if scale.captions == 2 else str(scale.captions)
    requests = objects / 1000 * PUT_1000 + reads / 1000 * GET_1000
    storage = stored_tb * 1000 * GB_MONTH
    gpu = (caption_h + encode_h) * scale.gpu_hour
    return [
        EstimateLine("canonical shards", shards, "", f"{scale.shard_rows:,} rows each: the unit of work and of loss"),
        EstimateLine("training shards", outputs, "", f"{scale.packed:.0%} of the rows"),
        EstimateLine("objects", objects, "", f"data and manifest of {columns} columns, three per training shard"),
        EstimateLine("a sample", sample_kb, "kB", f"moments {moments_kb:.1f} and {number} captions of {text_kb:.1f}"),
        EstimateLine("raw images, twice", 2 * raw_tb, "TB", "the source, and the ingest column that later passes read"),
        EstimateLine("columns", columns_tb, "TB", f"latents and text of {scale.past_gate:.0%}"),
        EstimateLine("training shards' bytes", packed_tb, "TB", "the columns may go once they are packed"),
        EstimateLine("writes", objects, "requests", "one per object; a restart writes only what is missing"),
        EstimateLine("reads", reads, "requests", "sources, columns by later passes, manifests once"),
        EstimateLine("captioning", caption_h, "GPU-hours", caption_how),
        EstimateLine("encoding", encode_h, "GPU-hours", f"{encode_ms:.1f} ms per sample (SD3, Table 7)"),
        EstimateLine("requests cost", requests, "dollars", "writes and reads"),
        EstimateLine("storage cost", storage, "dollars/month", "while all of it lies there"),
        EstimateLine("GPU cost", gpu, "dollars", f"at {scale.gpu_hour:g} dollars an hour"),
        EstimateLine("per million images", (gpu + requests) / scale.images * 1e6, "dollars", "GPUs and requests"),
    ]


def format_estimate(scale: ScaleAssumptions) -> str:
    """As markdown, which reads well in a terminal, too."""
    lines = ["| what | value | unit | how |", "|---|---|---|---|"]
    for line in estimate_costs(scale):
        value = f"{line.value:,.1f}" if line.value < 1000 else f"{line.value:,.0f}"
        lines.append(f"| {line.what} | {value} | {line.unit} | {line.how} |")
    return "\n".join(lines)
