"""Canny edges, drawn as a scribble ControlNet reads them: white on black."""

import numpy as np
from PIL import Image, ImageOps

# Of the gradient's L1 norm in the channel where it is largest: the defaults of ControlNet's own canny demo, by the same
# library.
LOW, HIGH = 100, 200


def edge_map(image: Image.Image, size: int) -> Image.Image:
    """The edges of the middle square of an RGB picture, [size, size] pixels, RGB with values 0 and 255.

    The middle square is what a training crop and CLIP's preprocessing see.

    Raises:
        ValueError: the picture has no edges.
    """
    import cv2

    edges = cv2.Canny(np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)), LOW, HIGH)
    if not edges.any():
        raise ValueError("the picture has no edges to follow")
    return Image.fromarray(edges).convert("RGB")
