"""The cross-attentions of a MODEL, and the replacement that sits in each of them.

The host keeps one replacement a cross-attention. Another pack's may sit there before ours (we call it,
and add to what it returns) or come after (it wraps ours, or hands ours a callback with ``add``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comfy.ldm.modules import attention as host_attention
from torch import Tensor

from ...ipadapter_instruct_core.attention import image_attention
from . import log

CALL = "ipadapter_instruct_call"  # where `sampling` leaves the current model call for the slots

SlotKey = tuple[str, int] | tuple[str, int, int]
Replacement = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


@dataclass(frozen=True)
class CrossAttention:
    """One text cross-attention of the host's UNet: its place in ``attn2``, widths of its own and of the text, heads."""

    block: tuple[str, int]
    index: int
    width: int
    text_width: int
    heads: int
    alone: bool

    def key(self, replacements: dict) -> SlotKey:
        """The key to patch: the block's, as other packs use it for one-layer transformers, unless the
        layer's own key is taken, which the host looks up first."""
        own = (*self.block, self.index)
        return own if own in replacements or not self.alone else self.block


def cross_attentions(diffusion_model: Any) -> list[CrossAttention]:
    """A UNet's text cross-attentions in the order of the adapter files' keys: down, up, middle.

    Empty for models that are not UNets. The middle block is ``("middle", 0)``; the ``("middle", 1)`` that
    is seen elsewhere is never called.
    """
    if not hasattr(diffusion_model, "input_blocks"):
        return []
    stages = [("input", i, block) for i, block in enumerate(diffusion_model.input_blocks)]
    stages += [("output", i, block) for i, block in enumerate(diffusion_model.output_blocks)]
    if getattr(diffusion_model, "middle_block", None) is not None:
        stages.append(("middle", 0, diffusion_model.middle_block))
    found = []
    for name, number, block in stages:
        for module in block:
            layers = getattr(module, "transformer_blocks", [])
            for index, layer in enumerate(layers):
                attention = getattr(layer, "attn2", None)
                if attention is not None:
                    widths = attention.to_q.out_features, attention.to_k.in_features
                    found.append(CrossAttention((name, number), index, *widths, attention.heads, len(layers) == 1))
    return found


def text_attention(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
    """What the host does where nothing is patched, by whatever backend it has chosen."""
    return host_attention.optimized_attention(
        q,
        k,
        v,
        extra_options["n_heads"],
        attn_precision=extra_options.get("attn_precision"),
        transformer_options=extra_options,
    )


class AttentionSlot:
    """Decoupled cross-attention of one layer: what was there before, plus each application's image attention.

    Holds no weights and no state of a run: its layer, and the places in the chain of the applications that it serves.
    Those are numbers, since a compiler that meets an object as a key gives up on the graph. It only changes through
    `add`, the popular pack's way to share a slot; each clone of a MODEL gets its own copies (see `apply.renew_slots`),
    so a cached one never does.
    """

    def __init__(
        self,
        layer: int,
        places: tuple[int, ...],
        previous: Replacement | None = None,
        followers: tuple[tuple[Callable, dict], ...] = (),
    ) -> None:
        self.layer = layer
        self.places = places
        self.previous = previous
        self.followers = followers

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        call = extra_options.get(CALL)
        sharing = self.followers or shares_rows(self.previous)
        others = call.options_for_others(extra_options) if sharing and call is not None else extra_options
        out = text_attention(q, k, v, extra_options) if self.previous is None else self.previous(q, k, v, others)
        if call is not None:
            for place in self.places:
                image = self._image(place, q, extra_options, call)
                out = out if image is None else out + image
        for callback, options in self.followers:
            if _in_range(options, extra_options):
                out = out + callback(out, q, k, v, others, **options)
        return out

    def _image(self, place: int, q: Tensor, extra_options: dict[str, Any], call: Any) -> Tensor | None:
        """What the application at a place of the chain adds; None where it does not act."""
        layers = call.key_values[place]
        if layers is None:
            return None
        tensors = (*layers[self.layer], call.mask(place, tuple(extra_options["activations_shape"][-2:])))
        if len(q) != call.batch:
            tensors = call.repeated(tensors, len(q), extra_options["cond_or_uncond"])
            if tensors is None:
                return None
        keys, values, mask = (None if each is None else each.to(q.device, q.dtype) for each in tensors)
        image = image_attention(q, keys, values)
        return image if mask is None else image * mask

    def with_application(self, place: int) -> "AttentionSlot":
        return AttentionSlot(self.layer, (*self.places, place), self.previous, self.followers)

    def copy(self) -> "AttentionSlot":
        return AttentionSlot(self.layer, self.places, self.previous, self.followers)

    def add(self, callback: Callable, **options: Any) -> None:
        """Called by later packs of the popular pack's family: their image attention is added to ours."""
        self.followers = (*self.followers, (callback, options))

    def set_new_condition(self, *args: Any, **options: Any) -> None:
        """Called by packs of an older kind, which expect their own object here."""
        raise ValueError(
            "Another adapter pack wants to take over a slot that IPAdapter-Instruct already uses; "
            "apply that pack first, and IPAdapter-Instruct after it."
        )

    def to(self, *args: Any, **kwargs: Any) -> "AttentionSlot":
        return self  # called with the weights' precision, fp8 included, which means nothing here

    def __deepcopy__(self, memo: dict) -> "AttentionSlot":
        return self


def shares_rows(replacement: Any) -> bool:
    """Whether another pack's replacement is of the kinds that add a picture's attention, by ``cond_or_uncond``."""
    return hasattr(replacement, "add") or hasattr(replacement, "set_new_condition")


def _in_range(options: dict, extra_options: dict[str, Any]) -> bool:
    """Whether another pack's callback is on: by the keys that the popular pack gives its range in."""
    if options.get("sigma_start") is None or "sigmas" not in extra_options:
        return True
    call = extra_options.get(CALL)
    sigma = call.sigma() if call is not None else float(extra_options["sigmas"][0])
    return options.get("sigma_end", 0.0) <= sigma <= options["sigma_start"]


def install(replacements: dict, slots: list[CrossAttention], place: int) -> None:
    """Put the application at a place of the chain into a clone's ``attn2`` replacements, beside whatever is there."""
    for layer, slot in enumerate(slots):
        key = slot.key(replacements)
        # A key of the whole block also serves a layer that has none of its own.
        existing = replacements.get(key, replacements.get(slot.block))
        if isinstance(existing, AttentionSlot) and existing.layer == layer:
            replacements[key] = existing.with_application(place)
        else:
            if existing is not None:
                log.debug("Slot %s is shared with %s", key, type(existing).__name__)
            replacements[key] = AttentionSlot(layer, (place,), existing)
