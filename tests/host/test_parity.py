"""The reference vectors' base model: the host's own UNet, with our real slots, keys and values in it."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.ldm.modules.diffusionmodules.openaimodel as host_unet
import comfy.ops
import torch
from bench import Application, Chain, Row, core_adapter, core_config, host_memory, run_module, slots
from reference_vectors import read_reference_vectors, rebuild_weights, relative_error

TOLERANCE = 5e-4


def test_unet_sd15() -> None:
    vectors = read_reference_vectors("unet-sd15")
    with torch.inference_mode():
        unet = host_unet.UNetModel(
            **{"out_channels": 4, **vectors.value("unet")}, operations=comfy.ops.disable_weight_init
        ).eval()
        shapes = {key: value.shape for key, value in unet.state_dict().items()}
        unet.load_state_dict(rebuild_weights(vectors.metadata["unet_salt"], shapes))
        weights = vectors.weights("ip_keys", "ip_salt")
        inputs = vectors.inputs
        tokens = inputs["tokens"]
        call = _call(weights, tokens, vectors.value("scale"), inputs["latents"])

        def noise(options: dict) -> torch.Tensor:
            timesteps = torch.full((len(tokens),), float(vectors.value("timestep")))
            return unet(inputs["latents"], timesteps, context=inputs["context"], transformer_options=options)

        replacements: dict = {}
        slots.install(replacements, slots.cross_attentions(unet), next(iter(call.applications)))
        adapted = noise({"patches_replace": {"attn2": replacements}, slots.CALL: call})
        plain = noise({})
    assert relative_error(plain, vectors.expected["noise_plain"]) < TOLERANCE
    assert relative_error(adapted, vectors.expected["noise_adapted"]) < TOLERANCE


def _call(weights: dict, tokens: torch.Tensor, scale: float, latents: torch.Tensor) -> run_module.ModelCall:
    """A model call as a sampling run prepares it, for a batch of which each row has its own tokens."""
    layers = tuple((int(key.split(".")[0]), value.shape[0]) for key, value in weights.items() if ".to_k_ip." in key)
    config = core_config.AdapterConfig(output_width=tokens.shape[-1], layers=tuple(sorted(layers)))
    adapter = core_adapter.Adapter(config)
    adapter.ip_adapter.load_state_dict(weights, strict=True)
    cpu = SimpleNamespace(load_device=torch.device("cpu"))
    each = Application(host_memory.HostedAdapter("reference", adapter, cpu), dict.fromkeys(Row, tokens), scale)
    guider = SimpleNamespace(
        conds={"positive": [{}]}, model_patcher=SimpleNamespace(get_model_object=lambda name: None)
    )
    run = run_module.SamplingRun(guider, Chain((each,)), latents)
    options = {"uuids": [guider.conds["positive"][0]["uuid"]]}
    return run.call(options, len(latents), frozenset({each}))
