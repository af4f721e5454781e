"""The frozen base model: UNet, autoencoder, text encoders and noise schedule of an SD1.5- or SDXL-like model."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ipadapter_instruct_core.config import Base
from torch import Tensor, nn

BASE_CONFIGS = Path(__file__).parent / "base_configs"
TEXT_LENGTH = 77


@dataclass(frozen=True)
class TextStates:
    """What a base model and an adapter read of a prompt.

    Attributes:
        hidden: the UNet's context, [B, L, W]: CLIP-L's last normed states; for SDXL the last but one of both towers.
        prompt: CLIP-L's last normed states, [B, L, 768]: what projectors with prompt layers and CLIP-L instructions
            read. The same tensor as ``hidden`` on SD1.5.
        pooled: SDXL's pooled vector, [B, 1280]; None on SD1.5.
    """

    hidden: Tensor
    prompt: Tensor
    pooled: Tensor | None


@dataclass(frozen=True)
class FrozenBase:
    """The parts of a base model, none of which is trained. ``unet`` is None where only encoders were asked for."""

    kind: Base
    unet: nn.Module | None
    vae: nn.Module
    text_encoders: tuple[nn.Module, ...]
    tokenizers: tuple[Any, ...]
    schedule: Any

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    def tokens(self, prompts: Sequence[str]) -> list[Tensor]:
        """Token numbers for each text encoder, [B, L], cut to CLIP's length."""
        return [
            tokenizer(
                list(prompts), padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
            ).input_ids
            for tokenizer in self.tokenizers
        ]

    def text_states(self, tokens: Sequence[Tensor]) -> TextStates:
        """Token numbers as from `tokens` -> hidden states, on the encoders' device."""
        outs = [
            encoder(ids.to(encoder.device), output_hidden_states=True)
            for encoder, ids in zip(self.text_encoders, tokens, strict=True)
        ]
        prompt = outs[0].last_hidden_state
        if self.kind is Base.SD15:
            return TextStates(prompt, prompt, None)
        hidden = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)
        return TextStates(hidden, prompt, outs[1].text_embeds)

    def latent_distribution(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, H, W] in -1..1 -> mean and standard deviation [B, 4, h, w] of scaled latents.

        An autoencoder without a distribution (AutoencoderTiny) has a deviation of zero.
        """
        encoded = self.vae.encode(pixels.to(self.vae.dtype))
        config = self.vae.config
        shift, scale = getattr(config, "shift_factor", None) or 0.0, config.scaling_factor
        if hasattr(encoded, "latent_dist"):
            return (encoded.latent_dist.mean - shift) * scale, encoded.latent_dist.std * scale
        mean = (encoded.latents - shift) * scale
        return mean, torch.zeros_like(mean)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, 4, h, w] -> pixels [B, 3, H, W] in 0..1."""
        config = self.vae.config
        unscaled = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        return (self.vae.decode(unscaled.to(self.vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    def size_condition(self, pixels: int, count: int) -> Tensor:
        """SDXL's size numbers [B, 6] (original size, crop, target size) of square uncropped pictures."""
        return torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], device=self.device).repeat(count, 1)

    def identities(self) -> dict[str, str]:
        """A hash of the autoencoder and of each text encoder, the same for any file format and precision."""
        names = ("text_encoder", "text_encoder_2")
        encoders = dict(zip(names, self.text_encoders, strict=False))
        return {"vae": fingerprint(self.vae)} | {name: fingerprint(model) for name, model in encoders.items()}


def fingerprint(model: nn.Module) -> str:
    """Hash of a model's weights rounded to half precision, so that a half and a full file of one model agree."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_floating_point():  # position numbers come and go with library versions
            digest.update(name.encode())
            digest.update(tensor.to("cpu", torch.float16).flatten().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def load_base(path: Path, config: Path | None = None, with_unet: bool = True) -> FrozenBase:
    """Load a base model in float32, from a diffusers folder or a single-file checkpoint; nothing is downloaded.

    Args:
        config: for a single file, a folder in diffusers' layout with the configurations of its parts; by default
            SD1.5's or SDXL's, as the file's own keys tell.

    Raises:
        ValueError: there is no such file or folder, or it is of another family.
    """
    _no_bars()
    if path.is_dir():
        pipe = _load_folder(path, with_unet)
    elif path.is_file():
        pipe = _load_single_file(path, config)
    else:
        raise ValueError(f"There is no base model {path}; give a diffusers folder or a .safetensors checkpoint.")
    two = getattr(pipe, "text_encoder_2", None) is not None
    encoders = (pipe.text_encoder, pipe.text_encoder_2) if two else (pipe.text_encoder,)
    tokenizers = (pipe.tokenizer, pipe.tokenizer_2) if two else (pipe.tokenizer,)
    for model in (pipe.unet, pipe.vae, *encoders):
        if model is not None:
            model.requires_grad_(False).eval().float()
    unet = pipe.unet if with_unet else None
    return FrozenBase(Base.SDXL if two else Base.SD15, unet, pipe.vae, encoders, tokenizers, _schedule(pipe))


def _no_bars() -> None:
    """Our own commands show how far they are; a bar for each file would push that off the screen."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _schedule(pipe: Any) -> Any:
    """The base's own noise schedule, in the form that training reads."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(pipe.scheduler.config)


def _load_folder(path: Path, with_unet: bool) -> Any:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    names = {"StableDiffusionPipeline": StableDiffusionPipeline, "StableDiffusionXLPipeline": StableDiffusionXLPipeline}
    index = path / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{path} holds no model_index.json; give the folder of a whole diffusers pipeline.")
    name = StableDiffusionPipeline.load_config(path)["_class_name"]
    if name not in names:
        raise ValueError(f"{path} is a {name}; adapters are trained on SD1.5 and SDXL pipelines.")
    absent = {"unet": None} if not with_unet else {}
    absent |= {"safety_checker": None, "feature_extractor": None} if name == "StableDiffusionPipeline" else {}
    try:
        return names[name].from_pretrained(path, local_files_only=True, **absent)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not a whole diffusers pipeline: {str(error).splitlines()[0]}") from error


def _load_single_file(path: Path, config: Path | None) -> Any:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path.name} is no .safetensors file; take that version of the checkpoint: others can run code."
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            keys = set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not a whole safetensors file; download it again.") from error
    if "model.diffusion_model.input_blocks.0.0.weight" not in keys:
        raise ValueError(
            f"{path.name} is no checkpoint of SD1.5 or SDXL with its autoencoder and text encoders inside."
        )
    sdxl = any(key.startswith("conditioner.embedders.1.") for key in keys)
    kind = StableDiffusionXLPipeline if sdxl else StableDiffusionPipeline
    tokenizers = {"tokenizer": clip_tokenizer("<|endoftext|>")}
    if sdxl:
        tokenizers["tokenizer_2"] = clip_tokenizer("!")
    else:
        tokenizers |= {"safety_checker": None, "feature_extractor": None}
    folder = config or BASE_CONFIGS / ("sdxl" if sdxl else "sd15")
    return kind.from_single_file(str(path), config=str(folder), local_files_only=True, **tokenizers)


def clip_tokenizer(padding: str) -> Any:
    """CLIP's tokenizer, made from the merges that open_clip brings, so that nothing has to be downloaded."""
    from open_clip import SimpleTokenizer
    from transformers import CLIPTokenizer

    source = SimpleTokenizer()
    merges = sorted(source.bpe_ranks, key=source.bpe_ranks.get)
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in source.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=padding, model_max_length=TEXT_LENGTH)
