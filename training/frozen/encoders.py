"""Every frozen encoder that an adapter is trained behind, and what each makes of a sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ipadapter_instruct_core.config import InstructionEncoder
from ipadapter_instruct_core.encoders import CLIP_MEAN, CLIP_STD, OpenClip, load_open_clip, preprocess
from ipadapter_instruct_core.tasks import EVERYTHING_ROW
from PIL import Image
from torch import Tensor, nn
from training.frozen.base import FrozenBase, fingerprint, load_base
from training.settings import Settings

CLIP_L = "clip-l"


class EncoderPaths(Settings):
    """Where the frozen models are; nothing is downloaded."""

    base: Path
    """Base model: a diffusers folder, or of SD1.5 and SDXL a single-file .safetensors checkpoint."""
    image_encoder: Path
    """CLIP ViT-H/14 image tower: an open_clip file or folder, or a transformers folder."""
    instruction_encoder: str = CLIP_L
    """What reads instructions: "clip-l" (the base's, as the released weights do), or the path of an open_clip model."""
    base_config: Path | None = None
    """For a single-file base that is no plain SD1.5 or SDXL: a diffusers folder with its configurations."""


def read_whole(kind: Any, folder: Path, what: str) -> Any:
    """``kind.from_pretrained`` of transformers or diffusers, which fills missing weights with random numbers.

    Raises:
        ValueError: the folder cannot be read, or lacks weights; the sentence says ``what`` it should hold.
    """
    from safetensors import SafetensorError

    try:
        model, report = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        why = " ".join(str(error).split("\n")[0].split(". ")[0].split()).rstrip(".:")
        raise ValueError(f"{folder} is no folder of {what} ({why}); give one, downloaded whole.") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} weights of {what} ({missing[0]}, ...); give the folder of a whole one."
        )
    return model


class HuggingFaceImageTower(nn.Module):
    """The image tower in transformers' layout, with the same three names as the core's `OpenClip`."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError where the folder holds another model, or not all of its weights."""
        from transformers import CLIPVisionModelWithProjection

        super().__init__()
        self.model = read_whole(CLIPVisionModelWithProjection, folder, "a transformers CLIP image tower").float()
        self.image_size: int = self.model.config.image_size
        self.image_width: int = self.model.config.hidden_size
        self.mean, self.std = CLIP_MEAN, CLIP_STD

    def preprocess(self, image: Tensor) -> Tensor:
        return preprocess(image, self.image_size)

    def image_tokens(self, pixels: Tensor) -> Tensor:
        return self.model(pixels, output_hidden_states=True).hidden_states[-2]


@dataclass(frozen=True)
class Encoders:
    """The base's encoders, the image tower, and the OpenCLIP instruction tower (None: the base's CLIP-L)."""

    base: FrozenBase
    image_tower: OpenClip | HuggingFaceImageTower
    instruction_tower: OpenClip | None

    @property
    def preprocess(self) -> Callable[[Tensor], Tensor]:
        """Pictures as the image tower takes them; without the tower, since a loader's workers are sent it."""
        tower = self.image_tower
        return partial(preprocess, size=tower.image_size, mean=tower.mean, std=tower.std)

    @property
    def instruction_encoder(self) -> InstructionEncoder:
        return InstructionEncoder.OPEN_CLIP if self.instruction_tower is not None else InstructionEncoder.CLIP_L

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "Encoders":
        """Move all of them, in place; the autoencoder stays in float32, since SDXL's overflows in half precision."""
        self.base.vae.to(device)
        for model in (*self.base.text_encoders, self.image_tower, self.instruction_tower):
            if model is not None:
                # T5 overflows in half precision.
                of_t5 = torch.bfloat16 if dtype is torch.float16 and model in self.base.text_encoders[2:] else dtype
                model.to(device, of_t5)
        return self

    def instruction_states(self, instructions: Sequence[str]) -> Tensor:
        """Instructions -> [B, L, W]."""
        if self.instruction_tower is not None:
            return self.instruction_tower.instruction_tokens(instructions)
        return self.base.prompt_states(self.base.tokens(instructions)[0])

    def image_states(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels [B, 3, S, S] -> penultimate states [B, N, W]."""
        device, dtype = _place(self.image_tower)
        return self.image_tower.image_tokens(pixels.to(device, dtype))

    def text_features(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the base and the projector read of prompts: ``text``, and beside SD1.5 ``prompt`` and ``pooled``."""
        states = self.base.text_states(self.base.tokens(prompts))
        features = {"text": states.hidden}
        return features if states.pooled is None else {**features, "prompt": states.prompt, "pooled": states.pooled}

    @torch.no_grad()
    def rows(self) -> dict[str, Tensor]:
        """The features of dropped conditions, without a batch: of the zero picture, of empty text, of "everything"."""
        size = self.image_tower.image_size
        empty = {f"empty_{name}": states[0] for name, states in self.text_features([""]).items()}
        no_instruction, everything = self.instruction_states(["", EVERYTHING_ROW])
        zero_image = self.image_states(torch.zeros(1, 3, size, size))[0]
        return {
            **empty,
            "zero_image": zero_image,
            "empty_instruction": no_instruction,
            "everything_instruction": everything,
        }

    def widths(self) -> dict[str, int]:
        """Width of each kind of states: of the picture, the instruction, the prompt, and the UNet's text."""
        rows = self.rows()
        prompt = rows.get("empty_prompt", rows["empty_text"])
        states = {"image": rows["zero_image"], "instruction": rows["empty_instruction"], "prompt": prompt}
        return {name: tensor.shape[-1] for name, tensor in {**states, "text": rows["empty_text"]}.items()}

    def identities(self) -> dict[str, str]:
        """A hash of each encoder, by which features are held to the models that they were made with."""
        tower = self.instruction_tower
        own = {"instruction_encoder": fingerprint(tower) if tower is not None else CLIP_L}
        return {**self.base.identities(), "image_encoder": fingerprint(self.image_tower), **own}


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(model.parameters())
    return parameter.device, parameter.dtype


def load_image_tower(path: Path) -> OpenClip | HuggingFaceImageTower:
    """Raises ValueError where the path holds neither kind of image tower."""
    if path.is_dir() and (path / "config.json").is_file():
        return HuggingFaceImageTower(path).requires_grad_(False).eval()
    if not path.exists():
        raise ValueError(f"There is no image encoder {path}; give an open_clip file or a transformers folder.")
    return load_open_clip(str(path))


def load_encoders(paths: EncoderPaths, with_network: bool = False) -> Encoders:
    """Load every frozen model in float32 on the CPU.

    Raises:
        ValueError: one of them is missing or of another kind; the sentence says which.
    """
    base = load_base(paths.base, paths.base_config, with_network)
    image_tower = load_image_tower(paths.image_encoder)
    if paths.instruction_encoder == CLIP_L:
        return Encoders(base, image_tower, None)
    if paths.instruction_encoder == str(paths.image_encoder) and isinstance(image_tower, OpenClip):
        return Encoders(base, image_tower, image_tower)
    if not Path(paths.instruction_encoder).exists():
        raise ValueError(
            f'There is no instruction encoder {paths.instruction_encoder}; give "clip-l" or an open_clip model.'
        )
    return Encoders(base, image_tower, load_open_clip(paths.instruction_encoder))


def picture_tensor(image: Image.Image) -> Tensor:
    """An RGB picture -> [1, 3, H, W] in 0-1."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255


def target_pixels(image: Image.Image, resolution: int) -> Tensor:
    """Short side to ``resolution``, middle cut out -> [3, R, R] in -1..1, as the autoencoder reads it."""
    from PIL import ImageOps

    square = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return picture_tensor(square)[0] * 2 - 1
