"""The tasks an adapter can be told to do, with their wording and the settings of the reference code."""

from dataclasses import dataclass
from enum import Enum

from .config import Base


class Task(Enum):
    """What to take from the picture. The first five are the paper's (Sec. 3.2)."""

    EVERYTHING = "everything"
    STYLE = "style"
    COMPOSITION = "composition"
    OBJECT = "object"
    FACE = "face"
    COLOUR = "colour"
    POSE = "pose"
    FOREGROUND = "foreground"
    BACKGROUND = "background"


class GuidanceMode(Enum):
    """How the predictions of a step are combined; see `guidance`."""

    SIMPLE = "simple"
    THREE_WAY = "three-way"


@dataclass(frozen=True)
class TaskDefaults:
    """Reference settings of one task on one base: ``weight`` is the strength that a weight of 1.0 stands for.

    ``text_scale`` is the guidance scale of the text, which in the host is the sampler's cfg.
    """

    weight: float
    guidance: GuidanceMode
    instruct_scale: float
    image_scale: float
    text_scale: float


# The first wording of each task is the one the released weights were trained on most plainly.
PHRASES: dict[Task, tuple[str, ...]] = {
    Task.EVERYTHING: ("use everything from the image", "recreate the whole image", "keep all of the image as it is"),
    Task.STYLE: ("use the style", "borrow the artistic style of the image", "paint it in the same style"),
    Task.COMPOSITION: ("use the composition", "keep the composition of the image", "follow the same composition"),
    Task.OBJECT: ("use the object", "take the object from the image", "put the object into the new scene"),
    Task.FACE: ("use the face", "keep the face of the person", "give them the same face"),
    Task.COLOUR: ("use the colour", "take the colour palette of the image", "keep the same colours"),
    Task.POSE: ("use the pose", "copy the pose of the figure", "keep the same pose"),
    Task.FOREGROUND: ("use the foreground", "take what stands in the foreground", "keep the same foreground"),
    Task.BACKGROUND: ("use the background", "take the background of the image", "keep the same background"),
}

# What the "everything" row of three-way guidance is told; the reference code uses the bare word.
EVERYTHING_ROW = "everything"

SIMPLE_TASKS = frozenset({Task.EVERYTHING, Task.STYLE, Task.COLOUR, Task.FACE})
SIMPLE_TASKS_ON_SD3 = SIMPLE_TASKS - {Task.FACE}
LOOSE_TASKS = frozenset({Task.COMPOSITION, Task.POSE})  # 0.2 less weight: layout overpowers the prompt soonest
STRONGLY_GUIDED_TASKS = frozenset({Task.COMPOSITION, Task.BACKGROUND, Task.OBJECT})
# The released weights of SDXL and SD3 never saw these three.
UNTRAINED = dict.fromkeys((Base.SDXL, Base.SD3), frozenset({Task.FOREGROUND, Task.BACKGROUND, Task.OBJECT}))


def phrase(task: Task, subject: str = "") -> str:
    """The task's own wording; a ``subject`` takes the place of the word "object" (paper, Sec. 3.4)."""
    words = PHRASES[task][0]
    return words.replace("object", subject) if subject and task is Task.OBJECT else words


def defaults(task: Task, base: Base) -> TaskDefaults:
    """Reference weight and guidance of a task.

    The paper scales the adapter back by 20-40 % at inference (Sec. 3.5); the reference code's figures
    are 0.8 on SD1.5 and SD3 and 0.9 on SDXL, 0.2 less for composition and pose on SD1.5 and SDXL.
    """
    if base in (Base.SD3, Base.SD35):  # for SD3.5 nobody has published any
        simple = task in SIMPLE_TASKS_ON_SD3
        return TaskDefaults(0.8, GuidanceMode.SIMPLE if simple else GuidanceMode.THREE_WAY, 6.0, 1.0, 6.0)
    sdxl = base is Base.SDXL
    return TaskDefaults(
        weight=round((0.9 if sdxl else 0.8) - (0.2 if task in LOOSE_TASKS else 0.0), 2),
        guidance=GuidanceMode.SIMPLE if task in SIMPLE_TASKS else GuidanceMode.THREE_WAY,
        instruct_scale=(6.0 if task in STRONGLY_GUIDED_TASKS else 4.0) if sdxl else 2.0,
        image_scale=0.5 if sdxl else 1.0,
        text_scale=7.0 if sdxl else 5.0,
    )
