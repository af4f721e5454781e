"""What a picture of the small world is made of, and which combinations adapters never see in training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SUBJECTS = ("cat", "fish", "house", "tree", "boat", "car", "mushroom", "flower")
PERSON = "person"
STYLES = ("poster", "pencil", "watercolour", "neon", "glass", "blueprint", "dots", "woodcut")
LAYOUTS = ("large", "upper left", "lower right", "far right", "pair", "near and far")
PORTRAIT = "portrait"
SCENES = ("meadow", "sea", "night", "desert", "snow", "room")
COLOURS = ("red", "yellow", "purple", "teal")
EXPRESSIONS = ("happy", "sad", "surprised", "sleepy")


@dataclass(frozen=True)
class Identity:
    """A person: what stays the same from picture to picture."""

    hair: str
    hair_colour: str
    skin: str
    glasses: bool
    beard: bool
    round_face: bool


IDENTITIES = (
    Identity("bald", "brown", "light", False, True, True),
    Identity("bald", "grey", "dark", True, False, False),
    Identity("short", "black", "tan", False, False, False),
    Identity("short", "blond", "light", True, True, True),
    Identity("spiky", "red", "light", False, False, True),
    Identity("spiky", "black", "tan", True, False, False),
    Identity("long", "blond", "tan", False, False, False),
    Identity("long", "red", "light", True, False, True),
    Identity("bun", "grey", "light", False, False, True),
    Identity("bun", "brown", "dark", True, False, False),
    Identity("curly", "black", "dark", False, False, True),
    Identity("curly", "red", "light", True, True, False),
    Identity("bob", "black", "light", False, False, False),
    Identity("bob", "blond", "dark", True, False, True),
    Identity("pigtails", "brown", "tan", False, False, True),
    Identity("pigtails", "red", "light", True, False, False),
)


@dataclass(frozen=True)
class Factors:
    """One picture.

    Attributes:
        colour: of the subject, or of a person's shirt.
        identity, expression: a person's number in IDENTITIES and look; -1 and "" where the subject is a thing.
        tilt: of the head, in degrees; turn: -1 (looks left) to 1; zoom: size of the face, about 1.
        jitter: seed of the small differences (places, sizes, sides) between pictures of the same factors.
    """

    subject: str
    style: str
    layout: str
    scene: str
    colour: str
    identity: int = -1
    expression: str = ""
    tilt: float = 0.0
    turn: float = 0.0
    zoom: float = 1.0
    jitter: int = 0

    @property
    def held_out(self) -> bool:
        """Whether a pair of its factors is one of those that adapters are not trained on (6 to 10 % of each kind)."""
        style, scene = STYLES.index(self.style), SCENES.index(self.scene)
        if self.subject == PERSON:
            expression = EXPRESSIONS.index(self.expression)
            return (3 * self.identity + 5 * style) % 11 == 0 or (5 * self.identity + 3 * expression) % 11 == 0
        subject, layout = SUBJECTS.index(self.subject), LAYOUTS.index(self.layout)
        pairs = (3 * subject + 5 * style, 5 * subject + 3 * layout + 1, 7 * style + 2 * layout + 2, 2 * subject + scene)
        return any(number % 11 == 0 for number in pairs)


def sample(
    generator: np.random.Generator, held_out: bool | None = False, person: bool = False, **known: object
) -> Factors:
    """Random factors around those that are ``known``.

    Args:
        held_out: False for combinations of the training set, True for the others, None for any.
        person: a portrait, in place of a thing.
    """
    while True:
        choice = {name: str(generator.choice(values)) for name, values in _CHOICES.items()}
        if person:
            choice |= _person(generator)
        factors = Factors(**{**choice, "jitter": int(generator.integers(2**31)), **known})  # type: ignore[arg-type]
        if held_out is None or factors.held_out == held_out:
            return factors


_CHOICES = {"subject": SUBJECTS, "style": STYLES, "layout": LAYOUTS, "scene": SCENES, "colour": COLOURS}


def _person(generator: np.random.Generator) -> dict[str, object]:
    return {
        "subject": PERSON,
        "layout": PORTRAIT,
        "identity": int(generator.integers(len(IDENTITIES))),
        "expression": str(generator.choice(EXPRESSIONS)),
        "tilt": float(generator.uniform(-14, 14)),
        "turn": float(generator.uniform(-1, 1)),
        "zoom": float(generator.uniform(0.88, 1.12)),
    }
