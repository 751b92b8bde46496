"""What the training loop consumes: one lane of a global batch, with the position of every sample."""
# Shapes: B batch, C latent channels, H and W latent height and width.

from typing import NamedTuple

from torch import LongTensor, Tensor

from model.encoders.text import TextCond


class LatentBatch(NamedTuple):
    """Latents drawn from the stored moments and normalised (fp32); caption chosen and encoders dropped already.

    The context is fp16 as it is stored (fp32 where parts are int8): backbones widen it. Do not write into a batch: its
    memory serves a later one when nobody holds a tensor of it any more.
    """

    latent_BCHW: Tensor
    text: TextCond
    positions: LongTensor
    keys: list[str]
    captions: list[str]
    rejected_BCHW: Tensor | None = None
    """Of preference pairs: the other picture's latents, of the same captions and draws (loading/pairs.py)."""
    dataset_B: Tensor | None = None
    """Of a mix: the number of the dataset that each sample is of (loading/mix.py)."""
    noise_BCHW: Tensor | None = None
    """Of couplings: the noise that a teacher made each latent of (loading/couplings.py)."""
