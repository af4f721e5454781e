"""What other packs do to the rows of a step, as far as it can be told before the model is called."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from comfy.patcher_extension import WrappersMP

from .application import CHAIN
from .slots import Slot, shares_rows

# The host's own patches that treat every row alike: they may meet the rows that we add.
ROW_BY_ROW = ("nodes_freelunch", "nodes_hypertile", "nodes_model_downscale", "nodes_tomesd")
MODEL_WRAPPERS = (WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
# The host's step caches tell rows by their uuids, and must skip all of a step's together.
KNOWN_WRAPPERS = (CHAIN, "torch.compile", "easycache", "lazycache")


def meet_rows(patcher: Any, model_options: dict[str, Any], conds: Iterable[dict]) -> bool:
    """Whether a patch of someone else meets the rows of a call, and so may repeat, drop or reorder them, keep a list
    of them, or look for the negative among them."""
    options = model_options["transformer_options"]
    patches = chain.from_iterable(options.get("patches", {}).values())
    replacements = chain.from_iterable(group.values() for group in options.get("patches_replace", {}).values())
    wrappers = (
        key for kind in MODEL_WRAPPERS for key, some in options.get("wrappers", {}).get(kind, {}).items() if some
    )
    return (
        "model_function_wrapper" in model_options
        or any(not _module(patch).endswith(ROW_BY_ROW) for patch in patches)
        or any(not _is_ours(replacement) for replacement in replacements)
        or any(key not in KNOWN_WRAPPERS for key in wrappers)
        or any(name.startswith("diffusion_model") for name in patcher.object_patches)
        or any(map(_brings_its_own, conds))
    )


def read_predictions(model_options: dict[str, Any], ours: Any) -> bool:
    """Whether someone else looks at a step's two predictions."""
    after = [fn for fn in model_options.get("sampler_post_cfg_function", []) if fn is not ours]
    names = ("sampler_pre_cfg_function", "sampler_cfg_function", "sampler_calc_cond_batch_function")
    return bool(after or any(model_options.get(name) for name in names))


def renew_hints(lists: Iterable[Any]) -> None:
    """Let T2I-Adapters look at their hints anew: the host's keep what they made for another number of rows, and would
    be dropped."""
    for cond in chain.from_iterable(filter(None, lists)):
        control = cond.get("control")
        while control is not None:
            if getattr(control, "control_input", None) is not None:
                control.control_input = None
            control = getattr(control, "previous_controlnet", None)


def _module(patch: Any) -> str:
    return getattr(patch, "__module__", None) or ""


def _is_ours(replacement: Any) -> bool:
    return isinstance(replacement, Slot) and (
        replacement.previous is None or _is_ours(replacement.previous) or shares_rows(replacement.previous)
    )


def _brings_its_own(cond: dict) -> bool:
    """Whether a conditioning has hooks, which may hold patches, or a ControlNet of another pack."""
    control = cond.get("control")
    return cond.get("hooks") is not None or (control is not None and _module(type(control)) != "comfy.controlnet")
