"""The reference vectors' SD3: the host's own loader, guider and sampler, with our real patch on its MODEL."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.sd
import torch
from bench import (
    Application,
    Chain,
    Row,
    ThreeWay,
    core_adapter,
    core_config,
    host_apply,
    host_memory,
    run_module,
    slots,
)
from reference_vectors import ReferenceVectors
from torch import Tensor


def mmdit(vectors: ReferenceVectors, **changed: Tensor) -> Any:
    """The vectors' transformer as a MODEL; ``changed`` weights take the place of theirs, "." being "__" in names."""
    weights = vectors.weights("mmdit_keys", "mmdit_salt")
    weights |= {name.replace("__", "."): value for name, value in changed.items()}
    # The host would compute in half precision on a processor that has it.
    model = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float32})
    assert model is not None
    return model


def hosted_adapter(vectors: ReferenceVectors, ops: Any = torch.nn) -> Any:
    """The vectors' layers, behind a small projector that is never asked."""
    weights = vectors.weights("ip_keys", "ip_salt")
    layers = sorted((int(key.split(".")[0]), len(value)) for key, value in weights.items() if ".to_k_ip." in key)
    width = vectors.value("mmdit")["context_embedder_config"]["params"]["in_features"]
    form = core_config.Form.JOINT
    config = core_config.AdapterConfig(
        width=64, heads=1, depth=1, output_width=width, base=core_config.Base.SD3, layers=tuple(layers), form=form
    )
    adapter = core_adapter.Adapter(config, ops)
    adapter.ip_adapter.load_state_dict(weights, strict=True)
    return host_memory.HostedAdapter("reference", adapter, host_memory._patcher(adapter))


def noise(vectors: ReferenceVectors, model: Any, adapter: Any = None, **settings: Any) -> Tensor:
    """One evaluation in which each row of the batch has its own tokens and timestep; without an adapter the bare
    model's."""
    inputs, options = vectors.inputs, model.model_options["transformer_options"]
    comfy.model_management.load_model_gpu(model)
    if adapter is not None:
        tokens = dict.fromkeys(Row, settings.pop("tokens", inputs["tokens"]))
        each = Application(adapter, tokens, settings.pop("weight", vectors.value("scale")), **settings)
        model = host_apply.apply(model, each)
        options = model.model_options["transformer_options"] | {slots.CALL: model_call(model, each, inputs["latents"])}
    return model.model.diffusion_model(
        inputs["latents"],
        torch.tensor(vectors.value("timestep")),
        context=inputs["context"],
        y=inputs["pooled"],
        transformer_options=options,
    )


def model_call(model: Any, each: Any, latents: Tensor) -> run_module.ModelCall:
    """As a sampling run prepares it, for one row of all these latents."""
    guider = SimpleNamespace(conds={"positive": [{}]}, model_patcher=model)
    run = run_module.SamplingRun(guider, Chain((each,)), latents)
    options = {"uuids": [guider.conds["positive"][0]["uuid"]]}
    return run.call(options, latents, latents.dtype, frozenset({each}))


def sampled(vectors: ReferenceVectors, three_way: bool) -> Tensor:
    """The model's own latents at the end, by the host's Euler with its scheduler `normal`."""
    inputs = vectors.inputs
    scales = ThreeWay(vectors.value("instruct_scale"), vectors.value("image_scale")) if three_way else None
    tokens = {row: inputs[f"tokens_{row.value}"] for row in Row}
    each = Application(hosted_adapter(vectors), tokens, vectors.value("scale"), three_way=scales)
    model = host_apply.apply(mmdit(vectors), each)
    guider = comfy.samplers.CFGGuider(model)
    texts = ([[inputs[name], {"pooled_output": inputs[f"pooled_{name}"]}]] for name in ("positive", "negative"))
    guider.set_conds(*texts)
    guider.set_cfg(vectors.value("text_scale"))
    start = torch.zeros_like(inputs["noise"])
    sampler = comfy.samplers.sampler_object("euler")
    latents = guider.sample(inputs["noise"], start, sampler, sigmas(vectors, model), disable_pbar=True, seed=0)
    return model.model.process_latent_in(latents)


def sigmas(vectors: ReferenceVectors, model: Any) -> Tensor:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", vectors.value("steps"))
