"""What an adapter is made of: one frozen dataclass, inferred from the weights' keys and shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch

HEAD_WIDTH = 64


class Base(Enum):
    """The diffusion model family that an adapter was trained on, told by the width of its tokens."""

    SD15 = "sd15"
    SDXL = "sdxl"
    SD3 = "sd3"
    OTHER = "other"

    @property
    def label(self) -> str:
        return {"sd15": "SD1.5", "sdxl": "SDXL", "sd3": "SD3", "other": "another base model"}[self.value]


class InstructionEncoder(Enum):
    """The text tower whose last, normed hidden states are the instruction tokens."""

    CLIP_L = "clip_l"
    OPEN_CLIP = "open_clip"


BASE_OF_TOKEN_WIDTH = {768: Base.SD15, 2048: Base.SDXL, 4096: Base.SD3}


@dataclass(frozen=True)
class AdapterConfig:
    """Every size of an adapter.

    ``instruction_width`` is None for a plain IPAdapter+ file, ``prompt_width`` is None for the paper's
    projector (Fig. 3) and set for the released one, which reads the text prompt as well.
    ``layers`` pairs each cross-attention's number in the file with its width, in key order.
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
            ValueError: a key that every adapter has is missing; the message names it.
        """

        def shape(key: str) -> torch.Size:
            if f"image_proj.{key}" not in state:
                raise ValueError(f"the weight image_proj.{key} is missing")
            return state[f"image_proj.{key}"].shape

        def input_width(key: str) -> int | None:
            return state[f"image_proj.{key}"].shape[1] if f"image_proj.{key}" in state else None

        def ff_mult(layers: str) -> int:
            wide, narrow = shape(f"{layers}.0.1.1.weight")
            return wide // narrow

        _, token_count, width = shape("latents")
        output_width = shape("norm_out.weight")[0]
        instruction_width = input_width("proj_new_input.weight")
        numbers = sorted(int(key.split(".")[1]) for key in state if key.endswith(".to_k_ip.weight"))
        base = metadata.get("base")
        encoder = metadata.get("instruction_encoder")
        return cls(
            image_width=shape("proj_in.weight")[1],
            width=width,
            heads=shape("layers.0.0.to_q.weight")[0] // HEAD_WIDTH,
            depth=1 + max(int(key.split(".")[2]) for key in state if key.startswith("image_proj.layers.")),
            token_count=token_count,
            output_width=output_width,
            image_ff_mult=ff_mult("layers"),
            instruction_width=instruction_width,
            prompt_width=input_width("proj_prompt_input.weight"),
            instruction_ff_mult=ff_mult("new_input_layers") if instruction_width else 2,
            layers=tuple((n, state[f"ip_adapter.{n}.to_k_ip.weight"].shape[0]) for n in numbers),
            base=Base(base) if base else BASE_OF_TOKEN_WIDTH.get(output_width, Base.OTHER),
            instruction_encoder=InstructionEncoder(encoder) if encoder else encoder_of_width(instruction_width),
        )


def encoder_of_width(instruction_width: int | None) -> InstructionEncoder:
    """CLIP-L's hidden states are 768 wide; the paper's ViT-H/14 text tower (1024) and others come by OpenCLIP."""
    return InstructionEncoder.CLIP_L if instruction_width in (None, 768) else InstructionEncoder.OPEN_CLIP
