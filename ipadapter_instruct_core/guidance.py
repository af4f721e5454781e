"""How the predictions of one step are combined: pure functions of rows (reference code's formulas).

Rows, each one evaluation of the base model (s are scales):
    full        the text prompt; tokens of (image, instruction, prompt)
    everything  the negative text; tokens of (image, "everything", prompt)
    image       the negative text; tokens of (image, negative prompt as instruction, negative prompt)
    uncond      the negative text; tokens of (zero image, "" as instruction, negative prompt)
"""

from collections.abc import Mapping
from enum import Enum

from torch import Tensor


class Row(Enum):
    FULL = "full"
    EVERYTHING = "everything"
    IMAGE = "image"
    UNCOND = "uncond"


def simple_coefficients(text_scale: float) -> dict[Row, float]:
    """``uncond + s_text * (full - uncond)``, as one factor a row."""
    return {Row.FULL: text_scale, Row.UNCOND: 1.0 - text_scale}


def three_way_coefficients(text_scale: float, instruct_scale: float, image_scale: float) -> dict[Row, float]:
    """``uncond + s_instruct (full - everything) + s_text (everything - image) + s_image (image - uncond)``,
    as one factor a row. The factors add up to one, and a row whose factor is zero need not be evaluated."""
    return {
        Row.FULL: instruct_scale,
        Row.EVERYTHING: text_scale - instruct_scale,
        Row.IMAGE: image_scale - text_scale,
        Row.UNCOND: 1.0 - image_scale,
    }


def combine(predictions: Mapping[Row, Tensor], coefficients: Mapping[Row, float]) -> Tensor:
    """The weighted sum of the rows, all of one shape; rows with a zero factor may be absent."""
    terms = [predictions[row] * factor for row, factor in coefficients.items() if factor != 0.0]
    return sum(terms[1:], terms[0])


def simple(predictions: Mapping[Row, Tensor], text_scale: float) -> Tensor:
    """Classifier-free guidance with the picture in the positive row."""
    return combine(predictions, simple_coefficients(text_scale))


def three_way(
    predictions: Mapping[Row, Tensor], text_scale: float, instruct_scale: float, image_scale: float
) -> Tensor:
    """Guidance with a scale each for text, instruction and picture."""
    return combine(predictions, three_way_coefficients(text_scale, instruct_scale, image_scale))


def three_way_correction(
    predictions: Mapping[Row, Tensor], text_scale: float | Tensor, instruct_scale: float, image_scale: float
) -> Tensor | float:
    """``three_way - simple`` at one text scale: what a sampler that knows only classifier-free guidance lacks.

    ``(s_text - s_image) (uncond - image) + (s_text - s_instruct) (everything - full)``. A row that is not
    needed may be absent; 0.0 when the two formulas agree. A text scale that is a tensor is one for each latent.
    """
    several = isinstance(text_scale, Tensor)
    correction: Tensor | float = 0.0
    if several or text_scale != image_scale:
        correction = (text_scale - image_scale) * (predictions[Row.UNCOND] - predictions[Row.IMAGE])
    if several or text_scale != instruct_scale:
        correction = correction + (text_scale - instruct_scale) * (predictions[Row.EVERYTHING] - predictions[Row.FULL])
    return correction
