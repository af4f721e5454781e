"""Wordings -> instruction tokens: a CLIP's last hidden states after its final norm, whatever model it serves."""

from typing import Any

from torch import Tensor

from ...ipadapter_instruct_core.config import AdapterConfig, InstructionEncoder
from . import log
from .memory import HostedOpenClip, intermediate, on

# Larger than any CLIP's number of layers, which the host's text towers take for "the last, normed one".
LAST_LAYER = -100
LENGTH = 77  # of CLIP-L, which adapters were trained with


def encode_text(clip: Any, text: str, config: AdapterConfig, literal: bool) -> Tensor:
    """Encode a wording with the tower that the adapter was trained on.

    Args:
        clip: the host's CLIP or a `HostedOpenClip`.
        literal: take brackets as written (instructions), or as the host's emphasis, which is then
            dropped since the adapter was trained without (prompts).

    Returns:
        [1, L, W]; a text longer than L is cut, and a warning names what was lost.

    Raises:
        ValueError: the CLIP lacks the tower that the adapter reads.
    """
    if config.instruction_encoder is InstructionEncoder.OPEN_CLIP:
        return _encode_open_clip(clip, text, config, literal)
    return _encode_clip_l(clip, text, config, literal)


class UnusableConditioning:
    """Stands for a conditioning that could not be made; whoever uses it is told why."""

    def __init__(self, why: str) -> None:
        self._why = why

    def _refuse(self, *_: Any) -> Any:
        raise ValueError(self._why)

    __iter__ = __len__ = __getitem__ = __add__ = __radd__ = _refuse


def encode_prompts(clip: Any, prompt_clip: Any, *texts: str) -> list[list | UnusableConditioning]:
    """What CLIP Text Encode makes of each prompt, by ``prompt_clip`` where ``clip`` cannot.

    Raises:
        ValueError: ``prompt_clip`` is an OpenCLIP model.
    """
    if isinstance(prompt_clip, HostedOpenClip):
        raise ValueError(
            f"{prompt_clip.name} is an OpenCLIP model, which encodes no prompt for a checkpoint; connect the CLIP of "
            "your checkpoint to prompt_clip."
        )
    if prompt_clip is None and isinstance(clip, HostedOpenClip):
        unusable = UnusableConditioning(
            f"{clip.name} reads the instruction only, so there is no positive and no negative; connect the CLIP of "
            "your checkpoint to prompt_clip of the node that encodes the instruction."
        )
        return [unusable] * len(texts)
    encoder = clip if prompt_clip is None else prompt_clip
    return [encoder.encode_from_tokens_scheduled(encoder.tokenize(text)) for text in texts]


def _encode_open_clip(clip: Any, text: str, config: AdapterConfig, literal: bool) -> Tensor:
    wanted = f"an OpenCLIP text tower that is {config.instruction_width} wide"
    if not isinstance(clip, HostedOpenClip):
        raise ValueError(
            f"This adapter reads {wanted}, which no CLIP of a checkpoint holds; connect Load OpenCLIP Model "
            "(IPAdapter-Instruct) to the clip input."
        )
    if clip.model.text_width != config.instruction_width:
        raise ValueError(
            f"This adapter reads {wanted}, but {clip.name} is {clip.model.text_width} wide; "
            "choose the OpenCLIP model that the adapter was trained with."
        )
    _warn_of_cut(clip.model.cut_words(text), literal)
    clip.load()
    return intermediate(clip.model.instruction_tokens([text]))


def _encode_clip_l(clip: Any, text: str, config: AdapterConfig, literal: bool) -> Tensor:
    if isinstance(clip, HostedOpenClip):
        raise ValueError(
            f"This adapter reads CLIP-L, not {clip.name}; connect the CLIP of your checkpoint to the clip input."
        )
    tower = getattr(clip.cond_stage_model, "clip_l", None)
    if tower is None:
        raise ValueError(
            "This adapter reads CLIP-L, which the connected CLIP does not hold; connect the CLIP of an SD1.5, "
            "SDXL or SD3 checkpoint, or Load CLIP with clip_l.safetensors."
        )
    first, *others = clip.tokenize(text, disable_weights=literal)["l"]
    chunk = [(token[0], 1.0) for token in first]
    if len(first) > LENGTH:  # a Long-CLIP: its first places, which look at none behind them, are CLIP-L's
        chunk[LENGTH - 1] = (clip.tokenizer.clip_l.end_token, 1.0)
    _warn_of_cut(_words(clip, [first[LENGTH - 1 :], *others]), literal)  # the end token is no word
    clip.load_model()
    tower.reset_clip_options()
    try:
        tower.set_clip_options(
            {"layer": LAST_LAYER, "projected_pooled": False, "execution_device": clip.patcher.load_device}
        )
        with on(clip.patcher.load_device):
            hidden, _ = tower.encode_token_weights([chunk])[:2]
    finally:
        tower.reset_clip_options()
    if hidden.shape[-1] != config.instruction_width:
        raise ValueError(
            f"This adapter reads instructions that are {config.instruction_width} wide, but the connected CLIP-L is "
            f"{hidden.shape[-1]} wide; connect the CLIP that the adapter was trained with."
        )
    return intermediate(hidden[:, :LENGTH])


def _words(clip: Any, chunks: list) -> str:
    """The text of tokens that did not fit, as far as the host's tokenizer can tell it."""
    tokenizer = clip.tokenizer.clip_l
    special = {tokenizer.start_token, tokenizer.end_token, tokenizer.pad_token}
    ids = [token[0] for chunk in chunks for token in chunk if isinstance(token[0], int) and token[0] not in special]
    return "".join(tokenizer.inv_vocab[i] for i in ids).replace("</w>", " ").strip()


def _warn_of_cut(words: str, wording: bool) -> None:
    if words and wording:
        log.warning("The wording is longer than CLIP's 77 tokens; this end of it was cut: %r", words)
    elif words:
        log.info("A prompt is longer than the 77 tokens that the adapter reads; only the picture follows: %r", words)
