"""The final table of a run: rows by stage and status, what came out, what was set aside and where it is listed."""

from data_pipeline.flow.pipeline import PipelineResult
from data_pipeline.sources.seen import format_seen
from data_pipeline.stages.stage import OK

_ORDER = ("ingest", "measure", "filter", "signature", "bucket", "dedup", "caption", "latents")


def format_summary(root: str, outcome: PipelineResult) -> str:
    """Plain text, ready to print."""
    lines = [f"{'stage':<14}{'rows':>10}{'ok':>10}   other statuses", "-" * 72]
    stages = [name for name in _ORDER if name in outcome.counts]
    stages += sorted(name for name in outcome.counts if name not in (*_ORDER, "pack")) + ["pack"]
    for stage in stages:
        counts = outcome.counts[stage]
        not_ok = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()) if name != OK)
        lines.append(f"{stage:<14}{sum(counts.values()):>10,}{counts.get(OK, 0):>10,}   {not_ok}".rstrip())
    lines.append("-" * 72)
    source_lines = format_seen(outcome.seen, outcome.counts.get("ingest", {}))
    lines += [f"{'source' if number == 0 else '':<14}{line}" for number, line in enumerate(source_lines)]
    for name, split in outcome.info.splits.items():
        shapes = ", ".join(f"{bucket} {count:,}" for bucket, count in sorted(split.buckets.items()))
        shards = "shard" if split.num_shards == 1 else "shards"
        lines.append(f"{name:<14}{split.num_samples:>10,} samples in {split.num_shards} {shards}: {shapes}")
    placed, usable = sum(split.num_samples for split in outcome.info.splits.values()), outcome.info.counts.get(OK, 0)
    lines.append(f"{'buckets':<14}{placed:>10,} of {usable:,} usable images, each in the bucket nearest to its shape")
    aside = {name: count for name, count in outcome.info.counts.items() if name != OK}
    if aside:
        words = ", ".join(f"{count:,} {name}" for name, count in sorted(aside.items(), key=lambda item: -item[1]))
        lines.append(f"{'set aside':<14}{sum(aside.values()):>10,} rows: {words}")
        lines.append(f"{'':<14}listed with reasons in {outcome.rejected}")
    for unit, reason in outcome.failed.items():
        lines.append(f"FAILED {unit}: {reason}")
    if not outcome.computed:
        lines.append("nothing was missing: every shard was already proven by its manifest")
    lines.append(f"fingerprint   {outcome.info.fingerprint}")
    return "\n".join(lines)
