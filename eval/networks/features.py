"""What a network must offer for Frechet distances."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class FeatureNetwork(Protocol):
    """A feature space: pictures to (N, E)."""

    name: str
    version: str

    def __hash__(self) -> int: ...

    def images(self, images: Sequence[np.ndarray]) -> Any:
        """(N, E) of uint8 RGB pictures, unnormalised."""
        ...
