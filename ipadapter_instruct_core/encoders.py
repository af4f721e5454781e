"""The OpenCLIP towers that feed the projector: picture -> image tokens, instruction -> text tokens.

open_clip is heavy, so it is imported on first use.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .checkpoint import check_numbers, read

VIT_H_14 = "ViT-H-14"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# A picture longer than this many times its width is cut to its middle before it is resized: the
# resize happens before the crop, and would make gigabytes of a 1 x 4000 picture.
LONGEST_ASPECT = 4


def as_rgb(image: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 3, H, W]: one channel is repeated, a fourth (alpha) is left out."""
    return image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image[:, :3]


def crop_extremes(image: Tensor) -> Tensor:
    """Cut a very wide or tall [B, C, H, W] picture to its middle; others are returned as they are."""
    height, width = image.shape[-2:]
    limit = LONGEST_ASPECT * min(height, width)
    top, left = max(height - limit, 0) // 2, max(width - limit, 0) // 2
    return image[..., top : top + min(height, limit), left : left + min(width, limit)]


def preprocess(
    image: Tensor, size: int = 224, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Tensor:
    """Resize the short side, crop the middle, round to 8 bits and normalise, as CLIP was trained.

    Args:
        image: [B, C, H, W] in 0-1; see `as_rgb` for channels other than three.

    Returns:
        [B, 3, size, size].
    """
    image = crop_extremes(as_rgb(image))
    height, width = image.shape[-2:]
    scale = size / min(height, width)
    resized = (round(scale * height), round(scale * width))
    if resized != (height, width):
        image = interpolate(image, size=resized, mode="bicubic", antialias=True)
    top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
    image = image[..., top : top + size, left : left + size]
    image = (image * 255).clamp(0, 255).round() / 255
    return (image - image.new_tensor(mean).view(3, 1, 1)) / image.new_tensor(std).view(3, 1, 1)


class OpenClip(nn.Module):
    """An open_clip model, asked for the two hidden states that an adapter reads."""

    def __init__(self, model_config: Mapping[str, Any], preprocess_config: Mapping[str, Any] = {}) -> None:
        from open_clip import CLIP, SimpleTokenizer

        super().__init__()
        known = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
        self.clip = CLIP(**{key: model_config[key] for key in known if key in model_config})
        self.image_size: int = model_config["vision_cfg"].get("image_size", 224)
        self.image_width: int = model_config["vision_cfg"]["width"]
        self.text_width: int = model_config["text_cfg"]["width"]
        self.context_length: int = model_config["text_cfg"].get("context_length", 77)
        self.mean = tuple(preprocess_config.get("mean", CLIP_MEAN))
        self.std = tuple(preprocess_config.get("std", CLIP_STD))
        self.tokenizer = SimpleTokenizer(context_length=self.context_length)

    def preprocess(self, image: Tensor) -> Tensor:
        """[B, C, H, W] in 0-1 -> normalised [B, 3, S, S]."""
        return preprocess(image, self.image_size, self.mean, self.std)

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] -> the image tower's penultimate hidden states [B, N, W]."""
        out = self.clip.visual.forward_intermediates(
            pixels,
            indices=[-2],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        return torch.cat([out["image_intermediates_prefix"][0], out["image_intermediates"][0]], dim=1)

    def instruction_tokens(self, texts: Sequence[str]) -> Tensor:
        """Wordings -> the text tower's last hidden states after its final norm, [B, L, W]."""
        out = self.clip.forward_intermediates(
            # Not by a property named `device`: the host's memory manager sets an attribute of that name.
            text=self.tokenizer(list(texts)).to(self.clip.logit_scale.device),
            text_indices=[-1],
            normalize_intermediates=True,
            intermediates_only=True,
        )
        return out["text_intermediates"][0]

    def cut_words(self, text: str) -> str:
        """What a wording says beyond the tower's context length; "" when it fits."""
        room = self.context_length - 2
        return self.tokenizer.decode(self.tokenizer.encode(text)[room:]).strip()


def load_open_clip(source: str, config: Mapping[str, Any] | None = None) -> OpenClip:
    """Load a model from a file, a folder or the hub.

    Args:
        source: a weights file (its config in a ``.json`` of the same name or ``open_clip_config.json``
            beside it, else ViT-H/14), a folder that holds both, or ``hf-hub:owner/name``, which downloads.
        config: open_clip's ``model_cfg``, in place of the file's own.

    Raises:
        ValueError: the weights are not open_clip's or do not fit the config.
    """
    path = _download(source) if source.startswith("hf-hub:") else Path(source)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in (".safetensors", ".bin", ".pt"))
        if not files:
            raise ValueError(
                f"{path.name} holds no weights; expected a .safetensors or .bin file of an OpenCLIP model."
            )
        path = files[-1]
    state, _ = read(path)
    if not {"visual.conv1.weight", "token_embedding.weight"} <= state.keys():
        raise ValueError(
            f"{path.name} is not a whole OpenCLIP model (image and text tower in open_clip's own layout); "
            "take the file named open_clip_model.safetensors or open_clip_pytorch_model.bin."
        )
    whole = _read_config(path) if config is None else {"model_cfg": config}
    try:
        model = OpenClip(whole["model_cfg"], whole.get("preprocess_cfg", {}))
    except (KeyError, TypeError, RuntimeError) as error:  # open_clip's own, where settings are missing or unknown
        raise ValueError(
            f"The configuration of {path.name} is not that of a plain OpenCLIP model; "
            "take the open_clip_config.json from the page that the model comes from."
        ) from error
    state = {key: tensor.float() for key, tensor in state.items() if key != "text.text_projection"}
    unfit = _first_difference(model.clip.state_dict(), state)
    if unfit:
        raise ValueError(
            f"{path.name} does not fit its configuration ({unfit}). Put the model's open_clip_config.json "
            f"beside it, named {path.stem}.json."
        )
    check_numbers(path.name, state)
    model.clip.load_state_dict(state, strict=True)
    return model.requires_grad_(False).eval()


def _first_difference(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What is wrong with the weights, in a few words; "" when they fit."""
    for key, tensor in expected.items():
        if key not in state:
            return f"{key} is missing"
        if state[key].shape != tensor.shape:
            return f"{key} is {list(state[key].shape)}, not {list(tensor.shape)}"
    return next((f"{key} is unexpected" for key in state if key not in expected), "")


def _read_config(path: Path) -> dict[str, Any]:
    for beside in (path.with_suffix(".json"), path.with_name("open_clip_config.json")):
        if beside.exists():
            try:
                content = json.loads(beside.read_text())
            except ValueError:
                content = None
            if not isinstance(content, dict):
                raise ValueError(f"{beside.name} is not a model's configuration; download it again.")
            return content if "model_cfg" in content else {"model_cfg": content}
    from open_clip import get_model_config

    return {"model_cfg": get_model_config(VIT_H_14)}


def _download(source: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source.removeprefix("hf-hub:"), allow_patterns=["open_clip*"]))
