"""What sits in a MODEL's sites while a picture is sampled.

The host keeps one replacement a site. Another pack's may sit there before ours (we call it, and add to what it returns)
or come after (it wraps ours, or, in a UNet, hands ours a callback with ``add``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.ldm.modules import attention as host_attention
from torch import Tensor

from . import log
from .sites import Site

CALL = "ipadapter_instruct_call"  # where `sampling` leaves the current model call for the slots
OVERRIDE = "optimized_attention_override"  # where the host looks for a stand-in of its attention

Replacement = Callable[..., Any]


class Slot:
    """One site: what was there before, plus what each application adds to its attention.

    Holds no weights and no state of a run: its layer, and the places in the chain of the applications that it serves.
    Those are numbers, since a compiler that meets an object as a key gives up on the graph. Each clone of a MODEL gets
    its own copies (see `apply.renew_slots`).
    """

    def __init__(self, layer: int, places: tuple[int, ...], previous: Replacement | None = None) -> None:
        self.layer = layer
        self.places = places
        self.previous = previous

    def _with_images(
        self, out: Tensor, q: Tensor, image: slice, size: tuple[int, ...], call: Any, options: dict[str, Any]
    ) -> Tensor:
        """A site's attention with what the applications add to it, each of them made of the attention alone.

        Args:
            out: [B, P, H*d], before the site's output projection.
            q: [B, P, H*d].
            image: which positions are the picture's, from top left to bottom right.
            size: height and width of the picture in them.
            options: the host's, for the rows that it says there are.
        """
        total = out
        for place in self.places:
            acting = call.acting[place]
            if acting is None:
                continue
            gain = call.gain(place, size, q.shape[1])
            tensors = (*acting.key_values[self.layer], gain, *(() if acting.bias is None else (acting.bias,)))
            if len(q) != call.batch:
                tensors = call.repeated(tensors, len(q), options["cond_or_uncond"])
                if tensors is None:
                    continue
            keys, values, gain, *bias = (each.to(q.device, q.dtype) for each in tensors)
            addition = acting.layers[self.layer].addition(q, out, keys, values, image, *bias)
            total = torch.addcmul(total, addition, gain)
        return total

    def with_application(self, place: int) -> Slot:
        slot = self.copy()
        slot.places = (*self.places, place)
        return slot

    def copy(self) -> Slot:
        return type(self)(self.layer, self.places, self.previous)

    def to(self, *args: Any, **kwargs: Any) -> Slot:
        return self  # called with the weights' precision, fp8 included, which means nothing here

    def __deepcopy__(self, memo: dict) -> Slot:
        return self


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


class AttentionSlot(Slot):
    """Decoupled cross-attention of one layer of a UNet.

    Changes through `add`, the popular pack's way to share a slot, and through nothing else.
    """

    followers: tuple[tuple[Callable, dict], ...] = ()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        call = extra_options.get(CALL)
        sharing = self.followers or shares_rows(self.previous)
        others = call.options_for_others(extra_options) if sharing and call is not None else extra_options
        out = text_attention(q, k, v, extra_options) if self.previous is None else self.previous(q, k, v, others)
        if call is not None:
            size = tuple(extra_options["activations_shape"][-2:])
            out = self._with_images(out, q, slice(None), size, call, extra_options)
        for callback, options in self.followers:
            if _in_range(options, extra_options):
                out = out + callback(out, q, k, v, others, **options)
        return out

    def copy(self) -> AttentionSlot:
        slot = AttentionSlot(self.layer, self.places, self.previous)
        slot.followers = self.followers
        return slot

    def add(self, callback: Callable, **options: Any) -> None:
        """Called by later packs of the popular pack's family: their image attention is added to ours."""
        self.followers = (*self.followers, (callback, options))

    def set_new_condition(self, *args: Any, **options: Any) -> None:
        """Called by packs of an older kind, which expect their own object here."""
        raise ValueError(
            "Another adapter pack wants to take over a slot that IPAdapter-Instruct already uses; "
            "apply that pack first, and IPAdapter-Instruct after it."
        )


class JointSlot(Slot):
    """A block of SD3's or SD3.5's transformer: the host runs it, and asks us in place of its attention."""

    def __call__(self, args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        options = args["transformer_options"]
        call = options.get(CALL)
        run = extra["original_block"] if self.previous is None else lambda args: self.previous(args, extra)
        if call is None or all(call.acting[place] is None for place in self.places):
            return run(args)
        before, met = options.get(OVERRIDE), []
        compiling = torch.compiler.is_compiling()  # a graph breaks where something is noted inside a block
        image = slice(args["txt"].shape[1], args["txt"].shape[1] + args["img"].shape[1])  # the host puts text first

        def attend(func: Callable, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> Tensor:
            out = func(q, k, v, *rest, **named) if before is None else before(func, q, k, v, *rest, **named)
            if q.ndim != 3 or q.shape[1] != image.stop:  # SD3.5's second attention is of the picture alone
                return out
            if not compiling:
                met.append(True)
            return self._with_images(out, q, image, call.halved, call, options)

        out = run(args | {"transformer_options": options | {OVERRIDE: attend}})
        if not (met or compiling):
            call.run.warn(
                "Another patch computes this model's attention by itself, so the adapter is off where it does."
            )
        return out


SLOTS: dict[str, type[Slot]] = {"attn2": AttentionSlot, "dit": JointSlot}


def shares_rows(replacement: Any) -> bool:
    """Whether another pack's replacement is of the kinds that add a picture's attention, by ``cond_or_uncond``."""
    return hasattr(replacement, "add") or hasattr(replacement, "set_new_condition")


def shared_slots(options: dict[str, Any]) -> int:
    """How many of our slots another pack has a part in."""
    slots = (slot for group in options["patches_replace"].values() for slot in group.values())
    return sum(isinstance(slot, Slot) and bool(slot.previous or getattr(slot, "followers", ())) for slot in slots)


def _in_range(options: dict, extra_options: dict[str, Any]) -> bool:
    """Whether another pack's callback is on: by the keys that the popular pack gives its range in."""
    if options.get("sigma_start") is None or "sigmas" not in extra_options:
        return True
    call = extra_options.get(CALL)
    sigma = call.sigma() if call is not None else float(extra_options["sigmas"][0])
    return options.get("sigma_end", 0.0) <= sigma <= options["sigma_start"]


def install(replacements: dict[str, dict], sites: list[Site], place: int) -> None:
    """Put the application at a place of the chain into a clone's replacements, {group: {key: replacement}}, beside
    whatever is there."""
    for layer, site in enumerate(sites):
        group = replacements.setdefault(site.group, {})
        key = site.key(group)
        # A key of the whole block also serves a layer that has none of its own.
        existing = group.get(key, group.get(site.block))
        if isinstance(existing, Slot) and existing.layer == layer:
            group[key] = existing.with_application(place)
        else:
            if existing is not None:
                log.debug("Slot %s is shared with %s", key, type(existing).__name__)
            group[key] = SLOTS[site.group](layer, (place,), existing)
