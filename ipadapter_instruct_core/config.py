"""What an adapter is made of: one frozen dataclass, inferred from the weights' keys and shapes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import count, takewhile
from typing import TypeVar

import torch

HEAD_WIDTH = 64
_Choice = TypeVar("_Choice", bound=Enum)


class InstructionEncoder(Enum):
    """The text tower whose last, normed hidden states are the instruction tokens."""

    CLIP_L = "clip_l"
    OPEN_CLIP = "open_clip"


class Form(Enum):
    """How a layer of an adapter meets the attention that it adds to; `image_kv` has a class for each."""

    CROSS = "cross"  # a UNet's cross-attention: latent positions attend to the tokens
    JOINT = "joint"  # SD3's: all positions attend to the tokens and to what the attention made of the image's
    IMAGE_STREAM = "image-stream"  # SD3.5's: of a joint attention's positions the image's attend to the tokens

    @property
    def first(self) -> int:
        """The number of the first layer in a file; every second attention has one."""
        return 1 if self is Form.CROSS else 0


class Base(Enum):
    """The diffusion model family that an adapter was trained on, told by its form and the width of its tokens."""

    SD15 = "sd15"
    SDXL = "sdxl"
    SD3 = "sd3"
    SD35 = "sd35"
    OTHER = "other"

    @property
    def label(self) -> str:
        labels = {"sd15": "SD1.5", "sdxl": "SDXL", "sd3": "SD3", "sd35": "SD3.5", "other": "another base model"}
        return labels[self.value]

    @property
    def form(self) -> Form:
        """Of the adapters that are trained on it."""
        return {"sd3": Form.JOINT, "sd35": Form.IMAGE_STREAM}.get(self.value, Form.CROSS)


BASE_OF_TOKEN_WIDTH = {768: Base.SD15, 2048: Base.SDXL}
BASE_OF_FORM = {base.form: base for base in (Base.SD3, Base.SD35)}
# The end of a key that layers of no other form have.
KEY_OF_FORM = {Form.IMAGE_STREAM: ".norm_k_ip.weight", Form.JOINT: ".add_k_proj_ip.weight"}


@dataclass(frozen=True)
class AdapterConfig:
    """Every size of an adapter.

    ``instruction_width`` is None for a plain IPAdapter+ file, ``prompt_width`` is None for the paper's
    projector (Fig. 3) and set for the released one, which reads the text prompt as well.
    ``layers`` pairs each attention's number in the file with its width, in key order. ``output_suffix`` ends the names
    of the projector's last two layers, as SD3's files have them ("_big").
    """

    image_width: int = 1280
    width: int = 768
    heads: int = 12
    depth: int = 4
    token_count: int = 16
    output_width: int = 768
    image_ff_mult: int = 4
    instruction_width: int | None = 768
    prompt_width: int | None = 768
    instruction_ff_mult: int = 2
    layers: tuple[tuple[int, int], ...] = ()
    base: Base = Base.SD15
    instruction_encoder: InstructionEncoder = InstructionEncoder.CLIP_L
    form: Form = Form.CROSS
    output_suffix: str = ""

    @property
    def follows_instructions(self) -> bool:
        return self.instruction_width is not None

    @property
    def reads_prompt(self) -> bool:
        return self.prompt_width is not None

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str] = {}) -> "AdapterConfig":
        """Infer the sizes from a flat state dict in the released layout.

        ``metadata`` is read first for what shapes cannot tell (``base``, ``instruction_encoder``).

        Raises:
            ValueError: a key that every adapter has is missing or of no use; the message names it.
        """

        def shape(key: str, dimensions: int = 2) -> torch.Size:
            if key not in state:
                raise ValueError(f"the weight {key} is missing")
            if state[key].ndim != dimensions:
                raise ValueError(f"the weight {key} has {state[key].ndim} dimensions, not {dimensions}")
            return state[key].shape

        def input_width(key: str) -> int | None:
            return shape(key)[1] if key in state else None

        def ff_mult(layers: str) -> int:
            wide, narrow = shape(f"image_proj.{layers}.0.1.1.weight")
            return wide // max(narrow, 1)

        _, token_count, width = shape("image_proj.latents", 3)
        suffix = "_big" if "image_proj.norm_out_big.weight" in state else ""
        form = Form.JOINT if suffix else _form(state)
        output_width = shape(f"image_proj.norm_out{suffix}.weight", 1)[0]
        instruction_width = input_width("image_proj.proj_new_input.weight")
        numbers = _layer_numbers(state, form)
        base = _known(Base, metadata.get("base"))
        encoder = _known(InstructionEncoder, metadata.get("instruction_encoder"))
        return cls(
            image_width=shape("image_proj.proj_in.weight")[1],
            width=width,
            heads=shape("image_proj.layers.0.0.to_q.weight")[0] // HEAD_WIDTH,
            depth=_depth(state),
            token_count=token_count,
            output_width=output_width,
            image_ff_mult=ff_mult("layers"),
            instruction_width=instruction_width,
            prompt_width=input_width("image_proj.proj_prompt_input.weight"),
            instruction_ff_mult=ff_mult("new_input_layers") if instruction_width else 2,
            layers=tuple((n, shape(f"ip_adapter.{n}.to_k_ip.weight")[0]) for n in numbers),
            base=base or BASE_OF_FORM.get(form) or BASE_OF_TOKEN_WIDTH.get(output_width, Base.OTHER),
            instruction_encoder=encoder or encoder_of_width(instruction_width),
            form=form,
            output_suffix=suffix,
        )


def _form(state: Mapping[str, torch.Tensor]) -> Form:
    return next((form for form, end in KEY_OF_FORM.items() if any(key.endswith(end) for key in state)), Form.CROSS)


def _layer_numbers(state: Mapping[str, torch.Tensor], form: Form) -> list[int]:
    """The numbers of the layers, every second one: a gap is a layer that the file has lost."""
    found = _numbers(state, r"ip_adapter\.(\d{1,9})\.to_[kv]_ip\.weight$")
    numbers = list(takewhile(found.__contains__, count(form.first, 2)))
    if (lost := form.first + 2 * len(numbers)) < max(found, default=0):
        raise ValueError(f"the weight ip_adapter.{lost}.to_k_ip.weight is missing")
    return numbers


def _depth(state: Mapping[str, torch.Tensor]) -> int:
    found = _numbers(state, r"image_proj\.(?:\w+_)?layers\.(\d{1,9})\.")
    depth = next(number for number in count() if number not in found)
    if depth < max(found):
        raise ValueError(f"the weight image_proj.layers.{depth}.0.to_q.weight is missing")
    return depth


def _numbers(state: Mapping[str, torch.Tensor], pattern: str) -> set[int]:
    """The numbers in the keys of a kind. Counted up to the first gap, and never to the largest: a key of a few bytes
    may name any, and longer ones than these are found to be no adapter's."""
    return {int(match[1]) for match in map(re.compile(pattern).match, state) if match}


def _known(kind: type[_Choice], value: str | None) -> _Choice | None:
    """A choice that the metadata names, or None where it names none."""
    if value is None:
        return None
    if value not in {choice.value for choice in kind}:
        raise ValueError(f"its metadata names {value!r}, which is none of {', '.join(c.value for c in kind)}")
    return kind(value)


def encoder_of_width(instruction_width: int | None) -> InstructionEncoder:
    """CLIP-L's hidden states are 768 wide; the paper's ViT-H/14 text tower (1024) and others come by OpenCLIP."""
    return InstructionEncoder.CLIP_L if instruction_width in (None, 768) else InstructionEncoder.OPEN_CLIP
