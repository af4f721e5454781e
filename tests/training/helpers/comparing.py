"""Comparing pictures that went through JPEG."""

import numpy as np
from training.datasets.sample import decode_picture


def pixels(content: bytes) -> np.ndarray:
    """An encoded picture, [height, width, 3] in 0..255."""
    return np.asarray(decode_picture(content), dtype=np.float32)


def assert_alike(picture: np.ndarray, other: np.ndarray, tolerance: float = 4) -> None:
    """The same picture, but for what JPEG and resizing change."""
    assert picture.shape == other.shape
    assert np.abs(picture - other.astype(np.float32)).mean() < tolerance
