"""SD3 medium at its real size: the multiplications and additions of one model call, without and with the adapter,
counted on tensors that hold no numbers. What the adapter does by its published form is reckoned beside it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from . import host
from .report import Result, parser, results_table, write

BLOCKS, HEAD, TEXT, POOLED, TEXT_LENGTH, TOKENS = 24, 64, 4096, 2048, 154, 16
WIDTH = BLOCKS * HEAD
SIDES = (512, 1024)  # of the picture


def transformer() -> Any:
    """The host's own class with SD3 medium's sizes, on no device."""
    import comfy.ldm.modules.diffusionmodules.mmdit as mmdit
    import comfy.ops
    from comfy.ldm.modules.attention import attention_pytorch

    mmdit.optimized_attention = attention_pytorch  # counted the same on any machine

    embedder = {"target": "torch.nn.Linear", "params": {"in_features": TEXT, "out_features": WIDTH}}
    return mmdit.OpenAISignatureMMDITWrapper(
        input_size=None, patch_size=2, in_channels=16, out_channels=16, depth=BLOCKS, adm_in_channels=POOLED,
        num_patches=192**2, pos_embed_max_size=192, context_embedder_config=embedder, dtype=torch.float32,
        device=torch.device("meta"), operations=comfy.ops.disable_weight_init,
    )  # fmt: skip


def replaced(network: Any, latents: torch.Tensor) -> dict[str, Any]:
    """The transformer options of a model call under our slots, each row with tokens of its own."""
    pack = host.start()
    adapters, configs = pack("ipadapter_instruct_core.adapter"), pack("ipadapter_instruct_core.config")
    sites, slots = pack("nodes.host.sites").sites(network), pack("nodes.host.slots")
    layers = tuple((site.block[1], site.width) for site in sites)
    config = configs.AdapterConfig(64, 64, 1, 1, TOKENS, TEXT, layers=layers, form=configs.Form.JOINT)
    with torch.device("meta"):
        adapter = adapters.Adapter(config)
    keys = torch.empty(len(latents), BLOCKS, TOKENS, HEAD, device="meta")
    weight = torch.empty(1, 1, 1, device="meta")
    acting = pack("nodes.host.call").Acting(adapter.layers, [(keys, keys)] * len(sites), None, weight)
    halved = tuple(side // 2 for side in latents.shape[-2:])
    call = SimpleNamespace(acting=[acting], batch=len(latents), halved=halved, gain=lambda *place: weight)
    replacements: dict[str, dict] = {}
    slots.install(replacements, sites, place=0)
    return {"patches_replace": replacements, slots.CALL: call}


def counted(network: Any, side: int, adapted: bool) -> int:
    latents = torch.empty(1, 16, side // 8, side // 8, device="meta")
    inputs = {
        "context": torch.empty(1, TEXT_LENGTH, TEXT, device="meta"),
        "y": torch.empty(1, POOLED, device="meta"),
        "transformer_options": replaced(network, latents) if adapted else {},
    }
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network(latents, torch.zeros(1, device="meta"), **inputs)
    return counter.get_total_flops()


def reckoned(side: int) -> int:
    """Twelve blocks' own: keys and values of the image's positions, attention to them and the tokens, and an output
    projection of every position, two operations each."""
    image = (side // 16) ** 2
    every = image + TEXT_LENGTH
    return 12 * 2 * ((2 * image + every) * WIDTH**2 + 2 * every * (image + TOKENS) * WIDTH)


def results() -> list[Result]:
    network, found = transformer(), []
    for side in SIDES:
        bare = counted(network, side, adapted=False)
        more = counted(network, side, adapted=True) - bare
        name = f"arithmetic, SD3 medium, {side} x {side}:"
        found.append(Result(f"{name} teraoperations of the bare host's call", bare / 1e12, ""))
        found.append(Result(f"{name} more with the adapter, of them", more / bare, ""))
        found.append(Result(f"{name} more, of what its form asks for", more / reckoned(side), "", 1.0))
    return found


def main() -> None:
    chosen = parser(__doc__).parse_args()
    host.start()
    found = results()
    results_table("Arithmetic of one model call, a row", found)
    write(found, chosen.json)


if __name__ == "__main__":
    main()
