"""Factors -> words, in many wordings; any factor can be left out, for a condition picture to give it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

import numpy as np
from training.miniature.world.factors import IDENTITIES, PERSON, Factors, Identity

# The parts of a caption that can be left out. "subject" takes the colour with it, "identity" is a person's looks.
PARTS = ("subject", "colour", "style", "layout", "scene", "identity", "expression")

STYLE_WORDS: dict[str, tuple[str, ...]] = {
    "poster": ("flat poster", "a poster in flat loud colours", "screen-printed poster style"),
    "pencil": ("pencil sketch", "a grey pencil drawing", "drawn in pencil on paper"),
    "watercolour": ("watercolour", "a soft watercolour painting", "painted in watercolour"),
    "neon": ("neon lights", "glowing neon on black", "a neon sign"),
    "glass": ("stained glass", "a stained glass window", "made of stained glass"),
    "blueprint": ("blueprint", "white lines on a blueprint", "a blueprint drawing"),
    "dots": ("pointillism", "a pointillist painting", "painted in dots"),
    "woodcut": ("woodcut", "a woodcut print", "carved as a woodcut"),
}
SCENE_WORDS: dict[str, tuple[str, ...]] = {
    "meadow": ("on a meadow", "in a green meadow", "in the grass"),
    "sea": ("by the sea", "at sea", "in front of the waves"),
    "night": ("at night", "under the moon and stars", "in a starry night"),
    "desert": ("in the desert", "among sand dunes", "in the hot desert"),
    "snow": ("in the snow", "in front of snowy mountains", "in winter"),
    "room": ("in a room", "indoors", "in a room with a window"),
}
# {one} and {many} stand for the subject.
LAYOUT_WORDS: dict[str, tuple[str, ...]] = {
    "large": ("{one} large in the middle", "a close view of {one}", "{one} filling the picture"),
    "upper left": ("{one} at the upper left", "{one} in the top left corner"),
    "lower right": ("{one} at the lower right", "{one} in the bottom right corner"),
    "far right": ("{one} far away on the right", "{one} small on the right"),
    "pair": ("two {many} side by side", "a pair of {many}"),
    "near and far": ("{one} nearby and another far away", "{one} in front and one in the distance"),
}
EXPRESSION_WORDS: dict[str, tuple[str, ...]] = {
    "happy": ("happy", "smiling", "laughing"),
    "sad": ("sad", "unhappy", "frowning"),
    "surprised": ("surprised", "astonished"),
    "sleepy": ("sleepy", "sleeping", "dozing"),
}
SOMETHING = ("something", "an object", "a thing")
THINGS = ("things", "objects")
FIXED_WORDS = (*SOMETHING, *THINGS, "a portrait of a person in a shirt", ",")  # what stands in no table above


def caption(factors: Factors, generator: np.random.Generator, leave_out: Collection[str] = ()) -> str:
    """One of the many wordings of what a picture shows, without the parts (of `PARTS`) that are left out."""

    def one_of(words: tuple[str, ...]) -> str:
        return words[generator.integers(len(words))]

    who = _person(factors, one_of, leave_out) if factors.subject == PERSON else _thing(factors, one_of, leave_out)
    where = "" if "scene" in leave_out else " " + one_of(SCENE_WORDS[factors.scene])
    text = who + where
    if "style" not in leave_out:
        style = one_of(STYLE_WORDS[factors.style])
        text = f"{style}, {text}" if generator.random() < 0.4 else f"{text}, {style}"
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def many(subject: str) -> str:
    """The plural."""
    return subject if subject == "fish" else subject + "s"


def random_omissions(generator: np.random.Generator) -> set[str]:
    """Parts to leave out of a training caption: none in half of the cases, else each with one chance in three."""
    if generator.random() < 0.5:
        return {"colour"} if generator.random() < 0.2 else set()
    return {part for part in PARTS if generator.random() < 1 / 3}


def _thing(factors: Factors, one_of: Callable[[tuple[str, ...]], str], leave_out: Collection[str]) -> str:
    if "subject" in leave_out:
        one, several = one_of(SOMETHING), one_of(THINGS)
    else:
        colour = "" if "colour" in leave_out else factors.colour + " "
        one = f"a {colour}{factors.subject}"
        several = colour + many(factors.subject)
    return one if "layout" in leave_out else one_of(LAYOUT_WORDS[factors.layout]).format(one=one, many=several)


def _person(factors: Factors, one_of: Callable[[tuple[str, ...]], str], leave_out: Collection[str]) -> str:
    look = "" if "expression" in leave_out else one_of(EXPRESSION_WORDS[factors.expression]) + " "
    who = f"a {look}person" if "layout" in leave_out else one_of((f"a {look}person", f"portrait of a {look}person"))
    if "identity" not in leave_out:
        who += " with " + looks(IDENTITIES[factors.identity])
    return who if "colour" in leave_out else f"{who} in a {factors.colour} shirt"


def looks(identity: Identity) -> str:
    """What tells an identity from the others: "light skin, spiky red hair and glasses"."""
    hair = "a bald head" if identity.hair == "bald" else _HAIR_WORDS[identity.hair].format(identity.hair_colour)
    beard = ", a beard" if identity.beard else ""
    return f"{identity.skin} skin, {hair}{beard}{' and glasses' if identity.glasses else ''}"


_HAIR_WORDS = {
    "short": "short {} hair", "spiky": "spiky {} hair", "long": "long {} hair", "bun": "{} hair in a bun",
    "curly": "big curly {} hair", "bob": "a {} bob", "pigtails": "{} pigtails",
}  # fmt: skip
