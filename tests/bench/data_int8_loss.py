"""What int8 text states do to a trained model's validation loss: same weights, samples and noise, only text differs.

python tests/bench/data_int8_loss.py DATA WEIGHTS [samples]. Differences are over seeds of the noise; the model was
trained on fp16 text and is not trained again.
"""

import json
import statistics
import sys

import torch

from data_pipeline.formats.layout import quantise_tokens
from data_pipeline.loading.loader import open_dataset
from model.diffusion.validation import VAL_PROTOCOLS, compute_validation_losses
from model.encoders.text import TextCond
from model.files.weights import load_model

SEEDS = (0, 1, 2, 3, 4)


def as_int8(text: TextCond, positions: slice) -> TextCond:
    """The context as it would come back from int8, for some of the tokens."""
    context_BLD = text.context_BLD.to(torch.float32, copy=True)
    for row in context_BLD:
        states, scales = quantise_tokens(row[positions].half().numpy())
        row[positions] = torch.from_numpy(states).float() * torch.from_numpy(scales)[:, None]
    return TextCond(context_BLD, text.pooled_BP, text.mask_BL)


def main() -> None:
    if len(sys.argv) < 3:
        print(__doc__)  # `make bench` has no trained model to give
        return
    data, weights = sys.argv[1:3]
    count = int(sys.argv[3]) if len(sys.argv) > 3 else 64
    model, meta = load_model(weights)
    model.eval()
    batch = open_dataset(data, split="val").read(range(count))
    tokens = batch.text.context_BLD.shape[1]
    clip = open_dataset(data, split="val").text_spec.clip_tokens
    variants = {
        "fp16": batch,
        "t5-int8": batch._replace(text=as_int8(batch.text, slice(clip, tokens))),
        "int8": batch._replace(text=as_int8(batch.text, slice(0, tokens))),
        "no text": batch._replace(text=batch.text.zeros_like()),
    }
    protocol = VAL_PROTOCOLS["sd3"]
    losses = {
        name: [
            protocol.mean(
                compute_validation_losses(model, given, protocol.levels, seed, formulation=meta["formulation"])
            )
            for seed in SEEDS
        ]
        for name, given in variants.items()
    }
    print(f"{weights}: {count} samples, loss of fp16 text {statistics.mean(losses['fp16']):.6f}")
    for name, found in losses.items():
        change = [100 * (other / base - 1) for other, base in zip(found, losses["fp16"])]
        spread = statistics.stdev(change) if name != "fp16" else 0.0
        print(json.dumps({name: round(statistics.mean(found), 6), "change_percent": round(statistics.mean(change), 5),
                          "deviation_over_seeds": round(spread, 5)}))  # fmt: skip


if __name__ == "__main__":
    main()
