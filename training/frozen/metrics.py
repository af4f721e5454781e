"""The scores of the paper's Sec. 4.1 as pure functions of CLIP embeddings, and the CLIP that makes those."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from ipadapter_instruct_core.tasks import Task
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

if TYPE_CHECKING:
    from ipadapter_instruct_core.encoders import OpenClip
    from PIL import Image

CLIP_SCORE_FACTOR = 2.5  # w of Hessel et al. 2021, CLIPScore, Sec. 3

# The two scores of each task, in the order of Table 1's columns.
TASK_METRICS: dict[Task, tuple[str, str]] = {
    Task.EVERYTHING: ("CLIP-I", "CLIP-T"),
    Task.STYLE: ("CLIP-S", "CLIP-P"),
    Task.OBJECT: ("CLIP-I", "CLIP-P"),
    Task.COMPOSITION: ("CLIP-I", "CLIP-P"),
    Task.FACE: ("CLIP-I", "CLIP-P"),
}
OF_CAPTIONS = ("CLIP-T", "CLIP-S")  # the scores that read the condition's own text


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each pair of rows, [B, D] x [B, D] -> [B] in -1..1; zero where a row is zero."""
    return (normalize(a.float(), dim=-1) * normalize(b.float(), dim=-1)).sum(dim=-1)


def clip_score(image: Tensor, text: Tensor) -> Tensor:
    """ClipScore of Hessel et al. 2021, ``2.5 max(cos, 0)``: [B, D] x [B, D] -> [B] in 0..2.5.

    The texts are embedded as they are, without the "A photo depicts" that Hessel et al. put before a caption:
    neither the paper nor IPAdapter says that it was used.
    """
    return CLIP_SCORE_FACTOR * cosine(image, text).clamp(min=0)


def clip_i(generated: Tensor, condition: Tensor) -> Tensor:
    """How much of the condition picture was passed on: the cosine of two images, [B, D] x [B, D] -> [B] in -1..1."""
    return cosine(generated, condition)


def clip_t(generated: Tensor, caption: Tensor) -> Tensor:
    """ClipScore of a generated image and the condition's original caption, [B, D] x [B, D] -> [B] in 0..2.5."""
    return clip_score(generated, caption)


def clip_p(generated: Tensor, prompt: Tensor) -> Tensor:
    """ClipScore of a generated image and the user's prompt, [B, D] x [B, D] -> [B] in 0..2.5."""
    return clip_score(generated, prompt)


def clip_s(generated: Tensor, prompt: Tensor, condition: Tensor, condition_prompt: Tensor) -> Tensor:
    """How much of the style was passed on: the cosine of what each image has beyond its own text.

    ``cos(generated - prompt, condition - condition_prompt)``, four times [B, D] -> [B] in -1..1. The embeddings are
    brought to unit length before the subtraction, since images and texts differ in length by what CLIP happened to
    learn. The paper does not say so; it is our reading. Nor does it say why Table 1 holds values above 1 under this
    name, which no cosine can reach: see `training.evaluate.scores.shown`.
    """
    generated, prompt, condition, condition_prompt = (
        normalize(embedding.float(), dim=-1) for embedding in (generated, prompt, condition, condition_prompt)
    )
    return cosine(generated - prompt, condition - condition_prompt)


def task_scores(
    task: Task,
    generated: Tensor,
    condition: Tensor,
    prompt: Tensor,
    condition_prompt: Tensor,
    captioned: Sequence[bool] | None = None,
) -> dict[str, Tensor]:
    """The two scores that Table 1 has for a task, by name; all embeddings [B, D], each score [B].

    ``captioned`` says which conditions have a text of their own, by default all: scores that read it are of those
    alone, and left out where there are none.

    Raises:
        ValueError: the paper has no scores for this task.
    """
    if task not in TASK_METRICS:
        known = ", ".join(known.value for known in TASK_METRICS)
        raise ValueError(f'The paper gives no scores for the task "{task.value}"; it does for {known}.')
    functions: dict[str, Callable[[], Tensor]] = {
        "CLIP-I": lambda: clip_i(generated, condition),
        "CLIP-T": lambda: clip_t(generated, condition_prompt),
        "CLIP-P": lambda: clip_p(generated, prompt),
        "CLIP-S": lambda: clip_s(generated, prompt, condition, condition_prompt),
    }
    scores = {name: functions[name]() for name in TASK_METRICS[task]}
    if captioned is not None:
        scores |= {name: scores[name][torch.tensor(captioned)] for name in OF_CAPTIONS if name in scores}
    return {name: values for name, values in scores.items() if len(values)}


class Embedder:
    """A CLIP whose image and text embeddings share one space; not normalised.

    Args:
        model: both towers of an OpenCLIP model; it stays on its device and in its precision.
        batch_size: how many pictures or texts go through a tower at once.
    """

    def __init__(self, model: "OpenClip", batch_size: int = 32) -> None:
        self.model = model
        self.batch_size = batch_size

    @torch.inference_mode()
    def images(self, images: Iterable["Image.Image"]) -> Tensor:
        """Pictures of any size -> [B, D] float32 on the CPU; of an iterator no more than a batch is held at once."""
        scale = self.model.clip.logit_scale
        rows = []
        for batch in self._batches(images):
            pixels = torch.cat([self.model.preprocess(_pixels(image)) for image in batch])
            rows.append(self.model.clip.encode_image(pixels.to(scale.device, scale.dtype)).float().cpu())
        return torch.cat(rows)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts, cut where they exceed the tower's context length -> [B, D] float32 on the CPU."""
        device = self.model.clip.logit_scale.device
        batches = (self.model.tokenizer(list(batch)).to(device) for batch in self._batches(texts))
        return torch.cat([self.model.clip.encode_text(tokens).float().cpu() for tokens in batches])

    def _batches(self, items: Iterable[Any]) -> Iterator[list[Any]]:
        left = iter(tqdm(items, "Embedding", leave=False, delay=5))
        batch = list(islice(left, self.batch_size))
        if not batch:
            raise ValueError("There is nothing to embed; hand over at least one picture or text.")
        while batch:
            yield batch
            batch = list(islice(left, self.batch_size))


def _pixels(image: "Image.Image") -> Tensor:
    """[1, 3, H, W] in 0-1."""
    import numpy as np

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 255


def mean_interval(
    values: Sequence[float], groups: Sequence[str], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The bootstrap's percentile interval of a mean of values that are independent of one another by group alone.

    Groups are drawn anew, each with all its values (the cluster bootstrap; Field and Welsh 2007): ten pictures of one
    person tell less than one picture of each of ten.

    Args:
        values: [B]; groups: of each of them.
        level: of confidence, in 0..1.

    Returns:
        (low, high). Of a single group nothing can be said: (nan, nan).

    Raises:
        ValueError: there are no values, or some are not finite.
    """
    import numpy as np

    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError("A confidence interval needs at least one value, and finite ones; look at the scores.")
    _, places = np.unique(list(groups), return_inverse=True)
    sums, counts = np.bincount(places, numbers), np.bincount(places)
    if len(sums) == 1:
        return math.nan, math.nan
    generator, chance = np.random.default_rng(seed), np.full(len(sums), 1 / len(sums))
    means = []
    for part in range(0, resamples, 500):  # at once: 8 MB of every 1,000 groups
        drawn = generator.multinomial(len(sums), chance, min(500, resamples - part))
        means.append(drawn @ sums / (drawn @ counts))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
