"""Targets that are generated: InstantStyle on the core's attention (style), and a scribble ControlNet (composition)."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from ipadapter_instruct_core.checkpoint import read
from ipadapter_instruct_core.config import Base
from ipadapter_instruct_core.encoders import load_open_clip
from ipadapter_instruct_core.guidance import Row, simple_coefficients
from ipadapter_instruct_core.image_kv import ImageKeyValue
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from training.datasets.targets.settings import Generation, InstantStyle, Scribble
from training.frozen.base import FrozenBase, fingerprint, load_base
from training.frozen.base_files import SD3_LIKE
from training.frozen.encoders import picture_tensor, read_whole
from training.frozen.sampling import Conditioning, initial_noise, sample, to_pictures
from training.frozen.unet import ImageKeyValues, prepare_unet

# Where InstantStyle injects the picture: its paper's style block on SDXL, its authors' (experimental) choice on SD1.5.
STYLE_BLOCKS = {Base.SDXL: ("up_blocks.0.attentions.1.",), Base.SD15: ("up_blocks.1.",)}


class GlobalProjector(nn.Module):
    """A plain IPAdapter: one global CLIP embedding -> a few tokens, and every layer's keys and values."""

    def __init__(self, state: dict[str, Tensor], name: str) -> None:
        """Raises ValueError where the file is no plain IPAdapter, or not a whole one."""
        super().__init__()
        if "image_proj.proj.weight" not in state:
            raise ValueError(
                f"{name} is no plain IPAdapter; InstantStyle needs one without a resampler, as ip-adapter_sd15."
            )
        try:
            self.width = state["image_proj.norm.weight"].shape[0]
            out, self.embedding_width = state["image_proj.proj.weight"].shape
            self.proj, self.norm = nn.Linear(self.embedding_width, out), nn.LayerNorm(self.width)
            numbers = sorted({int(key.split(".")[1]) for key in state if key.startswith("ip_adapter.")})
            widths = {n: state[f"ip_adapter.{n}.to_k_ip.weight"].shape[0] for n in numbers}
            self.ip_adapter = nn.ModuleDict({str(n): ImageKeyValue(self.width, width) for n, width in widths.items()})
            self.load_state_dict({key.removeprefix("image_proj."): tensor.float() for key, tensor in state.items()})
        except (KeyError, ValueError, RuntimeError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"{name} is not a whole plain IPAdapter ({why}); download it again.") from error
        self.layers = list(widths.items())

    def forward(self, embedding: Tensor) -> list[tuple[Tensor, Tensor]]:
        """[B, E] -> keys and values [B, 4, width], in key order."""
        tokens = self.norm(self.proj(embedding).unflatten(-1, (-1, self.width)))
        return [layer(tokens) for layer in self.ip_adapter.values()]


class Generator:
    """What both kinds of targets have in common: a base model, and a batch of pictures from prompts and seeds."""

    def __init__(self, settings: Generation) -> None:
        self.settings = settings
        self.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        self.base: FrozenBase = load_base(settings.base, settings.base_config)
        if self.base.kind in SD3_LIKE:
            raise ValueError(
                f"{settings.base} is {self.base.kind.label}; pictures of prompts are made with SD1.5 or SDXL, so give "
                "one of these."
            )
        self.coefficients = simple_coefficients(settings.guidance)
        self.layers = prepare_unet(self.base.network)
        dtype = torch.float16 if torch.cuda.is_available() else torch.float32
        self.base.vae.to(self.device)
        for model in (self.base.network, *self.base.text_encoders):
            model.to(self.device, dtype)

    def identities(self) -> dict[str, str]:
        """A hash of each model, by which a build is held to those that it began with, wherever they lie."""
        return {**self.base.identities(), "unet": fingerprint(self.base.network)}

    @torch.inference_mode()
    def pictures(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        image: ImageKeyValues | None = None,
        no_image: ImageKeyValues | None = None,
        controlnet: tuple[nn.Module, Tensor, float] | None = None,
    ) -> list[Image.Image]:
        """One picture a prompt, by classifier-free guidance against the negative prompt."""
        negative = [self.settings.negative_prompt] * len(prompts)
        states = [self.base.text_states(self.base.tokens(texts)) for texts in (prompts, negative)]
        conditions = {
            row: Conditioning(text.hidden, key_values, text.pooled)
            for row, text, key_values in zip((Row.FULL, Row.UNCOND), states, (image, no_image), strict=True)
        }
        side = self.settings.size // 8
        noise = initial_noise(seeds, (4, side, side))
        latents = sample(self.base, conditions, self.coefficients, noise, self.settings.steps, controlnet)
        return to_pictures(self.base.decode(latents))


class InstantStyleMaker(Generator):
    """Pictures of prompts in the style of conditions (Wang et al. 2024).

    The condition's CLIP embedding minus that of a text about its content goes into the style blocks alone.
    """

    def __init__(self, settings: InstantStyle) -> None:
        """Raises ValueError where the adapter, the encoder and the base do not fit one another."""
        super().__init__(settings)
        self.scale, self.content_scale = settings.scale, settings.content_scale
        name = settings.adapter.name
        self.adapter = GlobalProjector(read(settings.adapter)[0], name).requires_grad_(False).to(self.device)
        if self.adapter.layers != self.layers:
            raise ValueError(f"{name} is for another base: its cross-attentions are not those of {settings.base}.")
        self.clip = load_open_clip(str(settings.image_encoder)).to(self.device)
        projection: Any = self.clip.clip.text_projection
        width = projection.shape[1]
        if width != self.adapter.embedding_width:
            raise ValueError(
                f"{name} reads embeddings {self.adapter.embedding_width} wide, {settings.image_encoder.name} gives "
                f"{width}; take the image encoder that it was trained with."
            )
        names = [name for name in self.base.network.attn_processors if "attn2" in name]
        self.in_style_block = [name.startswith(STYLE_BLOCKS[self.base.kind]) for name in names]
        if not any(self.in_style_block):
            block = STYLE_BLOCKS[self.base.kind][0]
            raise ValueError(f"{settings.base} has no style block {block} to inject the style into.")

    def identities(self) -> dict[str, str]:
        more = {"adapter": fingerprint(self.adapter), "image_encoder": fingerprint(self.clip)}
        return super().identities() | more

    @torch.inference_mode()
    def style_embedding(self, conditions: Sequence[Image.Image], contents: Sequence[str]) -> Tensor:
        """CLIP embeddings [B, E] of the pictures, minus those of what they show; "" subtracts nothing."""
        pixels = torch.cat([self.clip.preprocess(picture_tensor(picture)) for picture in conditions]).to(self.device)
        embedding = self.clip.clip.encode_image(pixels)
        words = self.clip.clip.encode_text(self.clip.tokenizer(list(contents)).to(self.device))
        # The text's direction at the picture's length: the two towers' outputs differ in length.
        content = normalize(words, dim=-1) * embedding.norm(dim=-1, keepdim=True)
        known = torch.tensor([bool(content) for content in contents], device=self.device)[:, None]
        return embedding - self.content_scale * torch.where(known, content, 0.0)

    def key_values(self, embedding: Tensor) -> ImageKeyValues:
        """[B, E] -> keys and values of the style blocks; None in the others."""
        layers = zip(self.adapter(embedding), self.in_style_block, strict=True)
        return [(keys, values * self.scale) if inside else None for (keys, values), inside in layers]

    def __call__(
        self, conditions: Sequence[Image.Image], prompts: Sequence[str], seeds: Sequence[int], contents: Sequence[str]
    ) -> list[Image.Image]:
        """See `TargetMaker`."""
        embedding = self.style_embedding(conditions, contents)
        nothing = self.key_values(torch.zeros_like(embedding))
        return self.pictures(prompts, seeds, self.key_values(embedding), nothing)


class ScribbleMaker(Generator):
    """Pictures of prompts on the edges of conditions, by a scribble ControlNet."""

    def __init__(self, settings: Scribble) -> None:
        """Raises ValueError where the ControlNet is no whole diffusers folder."""
        from diffusers import ControlNetModel

        super().__init__(settings)
        network = read_whole(ControlNetModel, settings.controlnet, "a diffusers ControlNet")
        self.scale = settings.scale
        self.controlnet = network.requires_grad_(False).eval().to(self.device, self.base.network.dtype)

    def identities(self) -> dict[str, str]:
        return super().identities() | {"controlnet": fingerprint(self.controlnet)}

    def __call__(
        self, conditions: Sequence[Image.Image], prompts: Sequence[str], seeds: Sequence[int], contents: Sequence[str]
    ) -> list[Image.Image]:
        """See `TargetMaker`: conditions are white-on-black edge maps."""
        hints = torch.cat([picture_tensor(edges.convert("RGB")) for edges in conditions])
        return self.pictures(prompts, seeds, controlnet=(self.controlnet, hints, self.scale))


def target_maker(settings: Generation) -> InstantStyleMaker | ScribbleMaker:
    """Loads the models that the settings name. Raises ValueError where one is missing or does not fit."""
    if isinstance(settings, InstantStyle):
        return InstantStyleMaker(settings)
    assert isinstance(settings, Scribble)
    return ScribbleMaker(settings)
