"""Canny edges, drawn as a scribble ControlNet reads them: white on black."""

import numpy as np
from PIL import Image, ImageOps

# On the Sobel gradient of a picture in 0..255, without smoothing: the defaults of ControlNet's own canny demo.
LOW, HIGH = 100, 200


def edge_map(image: Image.Image, size: int) -> Image.Image:
    """The edges of the middle square of an RGB picture, [size, size] pixels, RGB with values 0 and 255.

    The middle square is what a training crop and CLIP's preprocessing see.

    Raises:
        ValueError: the picture has no edges.
    """
    from skimage.feature import canny

    grey = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS).convert("L")
    edges = canny(np.asarray(grey, dtype=np.float32) / 255, sigma=0, low_threshold=LOW / 255, high_threshold=HIGH / 255)
    if not edges.any():
        raise ValueError("the picture has no edges to follow")
    return Image.fromarray(edges.astype(np.uint8) * 255).convert("RGB")
