"""An application of an adapter -> a patched clone of a MODEL; the original is left as it was."""

from dataclasses import replace
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...ipadapter_instruct_core.config import AdapterConfig, Base, Form
from .application import CHAIN, Application, Chain, ThreeWay
from .memory import HostedAdapter
from .sampling import call_model, evaluate_conds, start_run
from .sites import Site, sites
from .slots import Slot, install
from .three_way import correct_guidance

WRAPPERS = {
    WrappersMP.SAMPLER_SAMPLE: start_run,
    WrappersMP.CALC_COND_BATCH: evaluate_conds,
    WrappersMP.APPLY_MODEL: call_model,
}


def matching_sites(model: ModelPatcher, adapter: HostedAdapter) -> list[Site]:
    """The model's sites, one a layer of the adapter.

    Raises:
        ValueError: the adapter was trained on another kind of model; the message names both.
    """
    found = sites(model.model.diffusion_model)
    config: AdapterConfig = adapter.config
    widths = [width for _, width in config.layers]
    wanted = [(width, config.output_width, config.form) for width in widths]
    if [(site.width, site.text_width, site.form) for site in found] != wanted:
        # The host has one word for SD3 and SD3.5.
        normed = found and found[0].form is Form.IMAGE_STREAM
        kind = Base.SD35.label if normed else type(model.model.model_config).__name__
        raise ValueError(
            f"{adapter.name} is an adapter for {config.base.label} ({len(widths)} attentions), but the connected "
            f"model is {kind} ({len(found)}); choose a checkpoint and an adapter of the same family."
        )
    return found


def apply(model: ModelPatcher, application: Application) -> ModelPatcher:
    """A clone of the model with the application in every site."""
    found = matching_sites(model, application.adapter)
    patched = model.clone()
    replacements = _own_replacements(patched)
    chain: Chain = patched.model_options["transformer_options"].get(CHAIN, Chain())
    install(replacements, found, len(chain.applications))
    _set_chain(patched, chain.extended(application))
    for kind, wrapper in WRAPPERS.items():
        patched.remove_wrappers_with_key(kind, CHAIN)
        patched.add_wrapper_with_key(kind, CHAIN, wrapper)
    patched.remove_callbacks_with_key(CallbacksMP.ON_CLONE, CHAIN)
    patched.add_callback_with_key(CallbacksMP.ON_CLONE, CHAIN, renew_slots)
    hosted = {id(a.adapter.patcher.model): a.adapter.patcher for a in chain.extended(application).applications}
    patched.set_additional_models(CHAIN, list(hosted.values()))
    return patched


def without(model: ModelPatcher) -> ModelPatcher:
    """A clone to which an application of no weight was asked for: the bare model, which our guider takes too."""
    patched = model.clone()
    options = patched.model_options["transformer_options"] = patched.model_options["transformer_options"].copy()
    options.setdefault(CHAIN, Chain())
    return patched


def with_guider_scales(model: ModelPatcher, scales: ThreeWay) -> ModelPatcher:
    """A clone whose applications are all guided three ways by these scales."""
    chain = model.model_options["transformer_options"].get(CHAIN)
    if chain is None:
        raise ValueError(
            "No IPAdapter-Instruct is applied to this model, so there is nothing to guide; "
            "connect the model through Apply IPAdapter-Instruct, or use CFGGuider."
        )
    patched = model.clone()
    _set_chain(patched, replace(chain, guider_scales=scales))
    return patched


def _set_chain(patched: ModelPatcher, chain: Chain) -> None:
    patched.model_options["transformer_options"][CHAIN] = chain
    registered: list[Any] = patched.model_options.get("sampler_post_cfg_function", [])
    if chain.may_be_three_way and correct_guidance not in registered:
        # Before other packs' in either order: it is a part of the guidance that they read, rescale or normalise.
        patched.model_options["sampler_post_cfg_function"] = [correct_guidance, *registered]
    if chain.needs_negative:
        patched.model_options["disable_cfg1_optimization"] = True


def _own_replacements(patched: ModelPatcher) -> dict[str, dict]:
    """The clone's replacements, {group: {key: replacement}}, in dictionaries of its own all the way down."""
    options = patched.model_options.get("transformer_options", {}).copy()
    patched.model_options["transformer_options"] = options
    groups = options.get("patches_replace", {}).items()
    options["patches_replace"] = {group: replacements.copy() for group, replacements in groups}
    return options["patches_replace"]


def renew_slots(original: ModelPatcher, clone: ModelPatcher) -> None:
    """After the host cloned a MODEL: the clone gets slots of its own, so that a later pack's ``add`` on it
    never reaches the original, on hosts that share patch objects between clones too."""
    for replacements in _own_replacements(clone).values():
        for key, replacement in replacements.items():
            if isinstance(replacement, Slot):
                replacements[key] = replacement.copy()
