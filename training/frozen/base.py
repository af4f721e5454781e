"""The frozen base model: UNet, autoencoder, text encoders and noise schedule of an SD1.5-, SDXL- or SD3-like model."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from ipadapter_instruct_core.config import Base
from torch import Tensor, nn
from torch.nn.functional import pad
from training.frozen.base_files import (
    SD3_LIKE,
    TEXT_ENCODERS,
    read_folder,
    read_single_file,
    single_file_kind,
    t5_tokenizer,
)

BASE_CONFIGS = Path(__file__).parent / "base_configs"
LATENT_CHANNELS = {Base.SD15: 4, Base.SDXL: 4, **dict.fromkeys(SD3_LIKE, 16)}
TEXT_LENGTH = 77  # T5's too: ComfyUI pads to it, and SD3 was trained with it
PADDING = (49407, 0, 0)  # CLIP-L's, which is its end token, that of the second text encoder, and T5's


@dataclass(frozen=True)
class TextStates:
    """What a base model and an adapter read of a prompt.

    Attributes:
        hidden: the UNet's context, [B, L, W]: CLIP-L's last normed states; for SDXL the last but one of both
            towers; for SD3 these, padded with zeros, and behind them T5's last.
        prompt: CLIP-L's last normed states, [B, L, 768]: what projectors with prompt layers and CLIP-L instructions
            read. The same tensor as ``hidden`` on SD1.5.
        pooled: SDXL's pooled vector, [B, 1280], or SD3's of both towers, [B, 2048]; None on SD1.5.
    """

    hidden: Tensor
    prompt: Tensor
    pooled: Tensor | None


@dataclass(frozen=True)
class FrozenBase:
    """The parts of a base model, none of which is trained.

    They are diffusers' and transformers' own, of classes that differ from base to base: hence ``Any``. ``network`` is
    the U-Net, or SD3's transformer, and None where only encoders were asked for. Where features are trained on,
    SD3's T5 is left out of the encoders.
    """

    kind: Base
    network: Any
    vae: Any
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    schedule: Any

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    @property
    def latent_channels(self) -> int:
        return LATENT_CHANNELS[self.kind]

    def tokens(self, prompts: Sequence[str]) -> list[Tensor]:
        """Token numbers for each text encoder, [B, L], cut to CLIP's length.

        SDXL's own second tokenizer pads with "!" and so takes every "!" of a prompt for a special token; ComfyUI and
        the original code, which pad with the number 0, do not. Here it is as with them.
        """
        found = [
            tokenizer(list(prompts), padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
            for tokenizer in self.tokenizers
        ]
        return [
            part.input_ids.masked_fill(part.attention_mask == 0, padding)
            for part, padding in zip(found, PADDING, strict=False)
        ]

    def prompt_states(self, tokens: Tensor) -> Tensor:
        """Token numbers [B, L] for the first encoder -> CLIP-L's last normed states [B, L, 768]."""
        encoder = self.text_encoders[0]
        return encoder(tokens.to(encoder.device)).last_hidden_state

    def text_states(self, tokens: Sequence[Tensor]) -> TextStates:
        """Token numbers as from `tokens` -> hidden states, on the encoders' device."""
        outs = [
            encoder(ids.to(encoder.device), output_hidden_states=True)
            for encoder, ids in zip(self.text_encoders, tokens, strict=True)
        ]
        prompt = outs[0].last_hidden_state
        if self.kind is Base.SD15:
            return TextStates(prompt, prompt, None)
        hidden = torch.cat([out.hidden_states[-2] for out in outs[:2]], dim=-1)
        if self.kind in SD3_LIKE:
            t5 = outs[2].last_hidden_state.to(hidden)
            hidden = torch.cat([pad(hidden, (0, t5.shape[-1] - hidden.shape[-1])), t5], dim=1)
            return TextStates(hidden, prompt, torch.cat([out.text_embeds for out in outs[:2]], dim=-1))
        return TextStates(hidden, prompt, outs[1].text_embeds)

    def latent_distribution(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, H, W] in -1..1 -> mean and standard deviation [B, C, h, w] of scaled latents.

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
        """Scaled latents [B, C, h, w] -> pixels [B, 3, H, W] in 0..1.

        One after another: a picture of 1024 pixels takes about 4 GB in float32.
        """
        config = self.vae.config
        unscaled = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        pixels = torch.cat([self.vae.decode(one).sample for one in unscaled.to(self.vae.dtype).split(1)])
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def added(self, pooled: Tensor | None, pixels: int, dtype: torch.dtype) -> dict[str, Tensor] | None:
        """What the network reads beside the text: the pooled vector [B, W], and on SDXL the picture's side."""
        if pooled is None:
            return None
        pooled = pooled.to(self.device, dtype)
        if self.kind in SD3_LIKE:
            return {"pooled_projections": pooled}
        return {"text_embeds": pooled, "time_ids": self.size_condition(pixels, len(pooled)).to(dtype)}

    def size_condition(self, pixels: int, count: int) -> Tensor:
        """SDXL's size numbers [B, 6] (original size, crop, target size) of square uncropped pictures."""
        return torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], device=self.device).repeat(count, 1)

    def identities(self) -> dict[str, str]:
        """A hash of the autoencoder and of each text encoder, the same for either file format, in half or in full."""
        encoders = dict(zip(TEXT_ENCODERS[self.kind], self.text_encoders, strict=False))
        return {"vae": fingerprint(self.vae)} | {name: fingerprint(model) for name, model in encoders.items()}


def fingerprint(model: nn.Module) -> str:
    """Hash of a model's weights rounded to half precision, so that a half and a full file of one model agree."""
    digest = hashlib.sha256()
    for name, tensor in sorted((name.removeprefix("text_model."), t) for name, t in model.state_dict().items()):
        if tensor.is_floating_point():  # position numbers come and go with library versions
            digest.update(name.encode())
            digest.update(tensor.to("cpu", torch.float16).flatten().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def load_base(path: Path, config: Path | None = None, with_network: bool = True, with_t5: bool = True) -> FrozenBase:
    """Load a base model in float32, from a diffusers folder or a single-file checkpoint; nothing is downloaded.

    Args:
        config: for a single file, a folder in diffusers' layout with the configurations of its parts; by default
            SD1.5's or SDXL's, as the file's own keys tell.
        with_t5: whether SD3's largest text encoder is loaded, in the precision of its file.

    Raises:
        ValueError: there is no such file or folder, it is of another family, or a part of it is missing or damaged.
    """
    _no_bars()
    if path.is_dir():
        parts = read_folder(path, with_network, with_t5)
    elif path.is_file():
        kind = single_file_kind(path)
        parts = read_single_file(path, kind, config or BASE_CONFIGS / kind.value, with_network)
    else:
        raise ValueError(f"There is no base model {path}; give a diffusers folder or a .safetensors checkpoint.")
    words = parts.text_encoders[0].config
    if words.hidden_act != "quick_gelu" or words.vocab_size < len(clip_tokenizer()):
        raise ValueError(f"{path} has no CLIP-L to read text, as {parts.kind.label} has; it may be an SD2 or another.")
    channels = parts.network.config.in_channels if with_network else LATENT_CHANNELS[parts.kind]
    if channels != LATENT_CHANNELS[parts.kind]:
        raise ValueError(f"{path} takes {channels} channels, as models for inpainting do; give a plain model.")
    for model in (parts.network, parts.vae, *parts.text_encoders):
        if model is not None:
            model.requires_grad_(False).eval()
    for model in (parts.network, parts.vae, *parts.text_encoders[:2]):
        if model is not None:
            model.float()
    tokenizers = (clip_tokenizer(),) * len(parts.text_encoders[:2])
    if len(parts.text_encoders) > 2:
        tokenizers += (t5_tokenizer(path),)
    return FrozenBase(parts.kind, parts.network, parts.vae, parts.text_encoders, tokenizers, parts.schedule)


def _no_bars() -> None:
    """Our own commands show how far they are; a bar for each file would push that off the screen."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


@cache
def clip_tokenizer(padding: str = "<|endoftext|>") -> Any:
    """CLIP's tokenizer, the same for every base, made from the merges that open_clip brings."""
    from open_clip import SimpleTokenizer
    from transformers import CLIPTokenizer

    source = SimpleTokenizer()
    merges: Any = sorted(source.bpe_ranks, key=source.bpe_ranks.__getitem__)
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in source.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=padding, model_max_length=TEXT_LENGTH)
