"""Reads what is written in pictures: rapidocr-onnxruntime, whose package carries its models."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from infra.errors import UserError

SMALLEST_SIDE = 256  # smaller pictures are enlarged before they are read: OCR models expect letters of some 20 pixels


class RapidReader:
    """rapidocr-onnxruntime (PP-OCR detection, direction and recognition)."""

    name = "rapidocr"

    def __init__(self) -> None:
        try:
            from importlib.metadata import version

            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            raise UserError(f"typography needs its OCR ({error}): pip install rapidocr-onnxruntime") from error
        self._ocr = RapidOCR()
        self.version = version("rapidocr-onnxruntime")

    def read(self, images: Sequence[np.ndarray]) -> list[str]:
        """The writing of each picture (uint8 RGB, H x W x 3) as one line in reading order; "" where none is found."""
        return [self._read_one(image) for image in images]

    def _read_one(self, image: np.ndarray) -> str:
        from PIL import Image

        factor = SMALLEST_SIDE / min(image.shape[:2])
        if factor > 1:
            height, width = image.shape[:2]
            size = (round(width * factor), round(height * factor))
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        found, _ = self._ocr(np.ascontiguousarray(image[..., ::-1]))  # as OpenCV has them: blue, green, red
        return " ".join(text for _, text, _ in _in_order(found or []))


def _in_order(found: Sequence[Any]) -> list[Any]:
    """Lines from top to bottom, each from left to right; boxes less than half a height apart share a line.

    A box is four corners, first the upper left one.
    """
    lines: list[list[Any]] = []
    for item in sorted(found, key=lambda item: _find_middle(item[0])):
        height = item[0][3][1] - item[0][0][1]
        if lines and abs(_find_middle(item[0]) - _find_middle(lines[-1][0][0])) < height / 2:
            lines[-1].append(item)
        else:
            lines.append([item])
    return [item for line in lines for item in sorted(line, key=lambda item: item[0][0][0])]


def _find_middle(box: Any) -> float:
    return (box[0][1] + box[3][1]) / 2
