"""The reference vectors' base model: the host's own UNet, with our real slots, keys and values in it."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.ldm.modules.diffusionmodules.openaimodel as host_unet
import comfy.ops
import torch
from bench import Application, Chain, Row, core_adapter, core_config, host_memory, run_module, sites, slots
from reference_vectors import read_reference_vectors, rebuild_weights, relative_error


def unet_errors(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Relative errors of the bare host's noise, ``noise_plain``, and of that with the adapter, ``noise_adapted``."""
    vectors = read_reference_vectors("unet-sd15")
    settings = {"out_channels": 4, **vectors.value("unet"), "dtype": dtype, "device": device}
    unet = host_unet.UNetModel(**settings, operations=comfy.ops.disable_weight_init).eval()
    shapes = {key: value.shape for key, value in unet.state_dict().items()}
    unet.load_state_dict(rebuild_weights(vectors.metadata["unet_salt"], shapes))
    inputs = {name: value.to(device, dtype) for name, value in vectors.inputs.items()}
    call = _call(unet, vectors.weights("ip_keys", "ip_salt"), inputs, vectors.value("scale"))
    timesteps = torch.full((len(inputs["tokens"]),), float(vectors.value("timestep")), device=device)

    def noise(options: dict) -> torch.Tensor:
        return unet(inputs["latents"], timesteps, context=inputs["context"], transformer_options=options)

    replacements: dict[str, dict] = {}
    slots.install(replacements, sites.sites(unet), place=0)
    found = {
        "noise_plain": noise({}),
        "noise_adapted": noise({"patches_replace": replacements, slots.CALL: call}),
    }
    return {name: relative_error(noise.float().cpu(), vectors.expected[name]) for name, noise in found.items()}


def _call(unet: torch.nn.Module, weights: dict, inputs: dict[str, torch.Tensor], scale: float) -> run_module.ModelCall:
    """A model call as a sampling run prepares it, for a batch of which each row has its own tokens."""
    tokens, latents = inputs["tokens"], inputs["latents"]
    layers = tuple((int(key.split(".")[0]), value.shape[0]) for key, value in weights.items() if ".to_k_ip." in key)
    config = core_config.AdapterConfig(output_width=tokens.shape[-1], layers=tuple(sorted(layers)))
    adapter = core_adapter.Adapter(config)
    adapter.ip_adapter.load_state_dict(weights, strict=True)
    adapter.to(tokens.device, tokens.dtype)
    there = SimpleNamespace(load_device=tokens.device)
    each = Application(host_memory.HostedAdapter("reference", adapter, there), dict.fromkeys(Row, tokens), scale)
    model = SimpleNamespace(diffusion_model=unet)
    patcher = SimpleNamespace(get_model_object=lambda name: None, model=model)
    guider = SimpleNamespace(conds={"positive": [{}]}, model_patcher=patcher)
    run = run_module.SamplingRun(guider, Chain((each,)), latents)
    options = {"uuids": [guider.conds["positive"][0]["uuid"]]}
    return run.call(options, latents, latents.dtype, frozenset({each}))
