"""Prompts from a file as a dataset of text alone, which couplings refer to as to any other dataset."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.checkpoints import hash_weights, resolve
from data_pipeline.couplings.proofs import read_shard_proofs, write_shard_proof
from data_pipeline.formats.layout import TextFeatures
from data_pipeline.formats.schema import DATASET_FILE, DatasetInfo, fingerprint, fingerprint_all
from data_pipeline.packing.publish import publish
from data_pipeline.packing.shards import TrainingSample, write_shard
from data_pipeline.stages.encode import TextStage
from data_pipeline.stages.stage import OK
from infra import storage
from infra.errors import UserError
from infra.log import Progress
from infra.runner import UnitResult, WorkerPool, WorkUnit, run_tasks
from model.encoders.text import TextSpec
from model.encoders.vae import Latents

CAPTION = "original"
SHARD_ROWS = 500
_BATCH = 64


def read_prompts(uri: str) -> list[str]:
    """Each prompt once, in the order of the file: lines of text, or of JSON with "prompt" or "caption" (.jsonl)."""
    try:
        lines = storage.read_bytes(uri).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{uri} is no text in UTF-8 ({error.reason}): expected one prompt a line") from error
    found = [_read_line(uri, number, line) if uri.endswith(".jsonl") else line.strip()
             for number, line in enumerate(lines) if line.strip()]  # fmt: skip
    if not found:
        raise UserError(f"{uri} holds no prompt: expected one a line, or a dataset with captions")
    return list(dict.fromkeys(found))


def _read_line(uri: str, number: int, line: str) -> str:
    expected = 'expected {"prompt": TEXT} or {"caption": TEXT}'
    try:
        record = json.loads(line)
        text = record.get("prompt", record.get("caption"))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{uri}, line {number + 1}: {error}; {expected}") from error
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{uri}, line {number + 1}: no prompt; {expected}")
    return text.strip()


def write_prompts(
    root: str, prompts: Sequence[str], text_spec: TextSpec, vae: Latents, *, workers: WorkerPool, device: str
) -> str:
    """Encode and publish; does only what is missing. Returns the folder's name below `root`, which says what it holds.

    A sample of this dataset has no picture: one latent pixel of zeros stands for it.
    """
    stages = [TextStage(text_spec, e.seat, hash_weights(resolve(e.checkpoint))) for e in text_spec.encoders]
    settings = {stage.name: stage.identity() for stage in stages}
    columns = {name: fingerprint(found) for name, found in settings.items()} | {"latents": "none"}
    name = f"prompts-{fingerprint([fingerprint_all(prompts), columns])}"
    out = storage.join(root, name)
    if storage.exists(storage.join(out, DATASET_FILE)):
        return name
    info = DatasetInfo(text_spec, vae, vae.factor, (CAPTION,), columns, {}, settings=settings)
    units = {f"{first:010d}": {"first": first, "prompts": list(prompts[first : first + SHARD_ROWS])}
             for first in range(0, len(prompts), SHARD_ROWS)}  # fmt: skip
    proofs = read_shard_proofs(out, info.encoding)
    todo = [{"id": key, **unit} for key, unit in units.items() if key not in proofs]
    num_done = sum(proof.entry.num_samples for proof in proofs.values() if proof.entry)
    with Progress(len(prompts), "prompts", desc="encode prompts", initial=num_done) as progress:
        for result in run_tasks(PromptTask(out, info, device), todo, workers):
            if result["error"]:
                raise UserError(f"prompts {result['id']}: {result['error']}; run the same command again")
            progress.update(result["rows"])
    proofs = read_shard_proofs(out, info.encoding)
    publish(out, info, [p.entry for key, p in proofs.items() if key in units and p.entry], {OK: len(prompts)})
    return name


@dataclass(frozen=True)
class PromptTask:
    """One shard of prompts through the text encoders."""

    root: str
    info: DatasetInfo
    device: str

    def open(self) -> Callable[[WorkUnit], UnitResult]:
        import torch

        from infra.device import resolve_device
        from model.encoders.networks import load_text_encoders

        info, bucket = self.info, f"{self.info.vae.factor}x{self.info.vae.factor}"
        texts = load_text_encoders(info.text_spec, resolve, device=resolve_device(self.device))
        layout = info.layout(bucket)
        nothing = np.zeros(layout.moments_shape, np.float16)

        @torch.inference_mode()
        def encode(first: int, prompts: Sequence[str]) -> Iterator[TrainingSample]:
            for start in range(0, len(prompts), _BATCH):
                chosen = prompts[start : start + _BATCH]
                encoded = texts.encode(chosen)
                for number, prompt in enumerate(chosen):
                    stored = {
                        seat: states.cut_to_layout(number, info.text_spec.layout) for seat, states in encoded.items()
                    }
                    features = {(CAPTION, seat): TextFeatures(hidden_LW.cpu().numpy(), pooled_P.cpu().numpy())
                                for seat, (hidden_LW, pooled_P) in stored.items()}  # fmt: skip
                    key = f"prompt-{first + start + number:010d}"
                    yield TrainingSample(key, nothing, features, {CAPTION: prompt}, {})

        def run(unit: WorkUnit) -> UnitResult:
            samples = encode(unit["first"], unit["prompts"])
            entry = write_shard(self.root, samples, split="train", resolution=info.resolution, bucket=bucket,
                                layout=layout, encoding=info.encoding)  # fmt: skip
            write_shard_proof(self.root, info.encoding, unit["id"], entry=entry)
            return {"rows": entry.num_samples}

        return run
