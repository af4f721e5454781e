"""What training sees at each place of each step: a pure function of the seed, so that a run resumes exactly.

Everything random of a step is drawn here, for a slot (step, position in the global batch): which sample, which
instruction, which conditions are dropped, the timestep, the noise. Processes, batch splits and restarts change nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from ipadapter_instruct_core.tasks import Task
from pydantic import Field
from torch import Tensor
from training.settings import Settings


class Dropped(Enum):
    """Which conditions a sample is trained without; each trains a row of guidance (`ipadapter_instruct_core.guidance`).

    NOTHING  full: text; tokens of (image, instruction, prompt).
    TEXT     everything: no text; tokens of (image, "everything", prompt) for replication, of (image, instruction,
             prompt) for the other tasks. A run without replication says "everything" in all its tasks, or the row
             would not be trained at all.
    WORDS    image: no text; tokens of (image, no instruction, no prompt).
    IMAGE    text; tokens of (zero image, instruction, prompt).
    ALL      uncond: no text; tokens of (zero image, no instruction, no prompt).

    SDXL's pooled vector of the text stays in all but the last, as it does in guidance.
    """

    NOTHING = "nothing"
    TEXT = "text"
    WORDS = "words"
    IMAGE = "image"
    ALL = "all"

    @property
    def keeps_text(self) -> bool:
        return self in (Dropped.NOTHING, Dropped.IMAGE)

    @property
    def keeps_pooled(self) -> bool:
        return self is not Dropped.ALL

    @property
    def keeps_image(self) -> bool:
        return self in (Dropped.NOTHING, Dropped.TEXT, Dropped.WORDS)

    @property
    def keeps_instruction(self) -> bool:
        return self in (Dropped.NOTHING, Dropped.TEXT, Dropped.IMAGE)


class Dropout(Settings):
    """How often conditions are dropped; IPAdapter's three shares of 5 %, and one for the image row."""

    text: float = Field(default=0.05, ge=0)
    """The text prompt alone; a replication sample, or any where there are none, is told "everything" (that row)."""
    words: float = Field(default=0.05, ge=0)
    """Text prompt, instruction, and the projector's prompt (the image row)."""
    image: float = Field(default=0.05, ge=0)
    """The condition picture alone."""
    all: float = Field(default=0.05, ge=0)
    """Every condition (the unconditional row)."""


@dataclass(frozen=True)
class Draw:
    """One slot: ``sample`` is the place in a source, ``instruction`` a number in 0..1 that picks a phrasing."""

    task: Task
    sample: int
    instruction: float
    dropped: Dropped
    timestep: int
    noise_seed: int
    without_replication: bool = False
    told: Task | None = None  # another task, whose wording the sample is told in place of its own's

    @property
    def told_everything(self) -> bool:
        """Whether this is the everything row."""
        return self.dropped is Dropped.TEXT and (self.task is Task.EVERYTHING or self.without_replication)

    def noise(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Two white noises of a latent's shape: that of the latent's own distribution, and that which is added."""
        generator = torch.Generator().manual_seed(self.noise_seed)
        return torch.randn(tuple(shape), generator=generator), torch.randn(tuple(shape), generator=generator)


class Draws:
    """Draws of one run."""

    def __init__(
        self,
        seed: int,
        samples: Mapping[Task, Sequence[int]],
        weights: Mapping[Task, float],
        dropout: Dropout,
        timesteps: int = 1000,
        logit_normal: bool = False,
    ) -> None:
        """``samples`` are the places of each task's samples; ``weights`` need not add up to one.

        ``logit_normal`` draws timesteps from the middle more often than from the ends (Esser et al. 2024, Sec. 3.1), as
        SD3 was trained; otherwise all are alike.

        Raises:
            ValueError: no task counts, or the shares of dropout exceed 1.
        """
        self.seed, self.samples, self.timesteps, self.logit_normal = seed, samples, timesteps, logit_normal
        self.tasks = [task for task in Task if weights.get(task, 0.0) > 0.0]
        if not self.tasks:
            raise ValueError("No task has a weight above 0 in `tasks`; give at least one.")
        shares = np.array([weights[task] for task in self.tasks])
        self.task_edges = np.cumsum(shares / shares.sum())
        self.dropped = [Dropped.TEXT, Dropped.WORDS, Dropped.IMAGE, Dropped.ALL]
        self.dropped_edges = np.cumsum([dropout.text, dropout.words, dropout.image, dropout.all])
        if self.dropped_edges[-1] > 1.0 + 1e-9:
            raise ValueError("The shares of dropout add up to more than 1; lower them.")

    def draw(self, step: int, position: int, attempt: int = 0) -> Draw:
        """The draw of one slot; ``attempt`` counts up where the sample drawn before turned out damaged."""
        # The counter's first word is what Philox itself counts up; the slot stands behind it, so that no two overlap.
        random = np.random.Generator(np.random.Philox(key=[self.seed, attempt], counter=[0, 0, step, position]))
        task_at, sample_at, instruction, dropped_at = random.random(4)
        task = self.tasks[min(int(np.searchsorted(self.task_edges, task_at, "right")), len(self.tasks) - 1)]
        places = self.samples[task]
        dropped = int(np.searchsorted(self.dropped_edges, dropped_at, "right"))
        return Draw(
            task=task,
            sample=places[int(sample_at * len(places))],
            instruction=instruction,
            dropped=self.dropped[dropped] if dropped < len(self.dropped) else Dropped.NOTHING,
            timestep=self._timestep(random),
            noise_seed=int(random.integers(2**63 - 1)),
            without_replication=Task.EVERYTHING not in self.tasks,
        )

    def _timestep(self, random: np.random.Generator) -> int:
        if not self.logit_normal:
            return int(random.integers(self.timesteps))
        return int(self.timesteps / (1 + np.exp(-random.standard_normal())))
