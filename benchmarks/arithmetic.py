"""SD3 medium and SD3.5 medium at their real size: the multiplications and additions of one model call, without and with
the adapter, counted on tensors that hold no numbers. What the adapter does by its form is reckoned beside it."""

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
NAMES = ("SD3 medium", "SD3.5 medium")


def transformer(name: str) -> Any:
    """The host's own class with a model's sizes, on no device."""
    import comfy.ldm.modules.diffusionmodules.mmdit as mmdit
    import comfy.ops
    from comfy.ldm.modules.attention import attention_pytorch

    mmdit.optimized_attention = attention_pytorch  # counted the same on any machine

    newer = {"qk_norm": "rms", "x_block_self_attn_layers": list(range(13))} if name == "SD3.5 medium" else {}
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": TEXT, "out_features": WIDTH}}
    return mmdit.OpenAISignatureMMDITWrapper(
        input_size=None, patch_size=2, in_channels=16, out_channels=16, depth=BLOCKS, adm_in_channels=POOLED,
        num_patches=192**2, pos_embed_max_size=192, context_embedder_config=embedder, dtype=torch.float32,
        device=torch.device("meta"), operations=comfy.ops.disable_weight_init, **newer,
    )  # fmt: skip


def replaced(network: Any, latents: torch.Tensor) -> dict[str, Any]:
    """The transformer options of a model call under our slots, each row with tokens of its own."""
    pack = host.start()
    adapters, configs = pack("ipadapter_instruct_core.adapter"), pack("ipadapter_instruct_core.config")
    sites, slots = pack("nodes.host.sites").sites(network), pack("nodes.host.slots")
    layers = tuple((site.block[1], site.width) for site in sites)
    config = configs.AdapterConfig(64, 64, 1, 1, TOKENS, TEXT, layers=layers, form=sites[0].form)
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


def reckoned(name: str, side: int) -> int:
    """Twelve blocks' own, two operations each. SD3.5's: attention of the image's positions to the tokens. SD3's: keys
    and values of the image's positions, attention to them and the tokens, and an output projection of every position.
    """
    image = (side // 16) ** 2
    if name == "SD3.5 medium":
        return 12 * 2 * 2 * image * TOKENS * WIDTH
    every = image + TEXT_LENGTH
    return 12 * 2 * ((2 * image + every) * WIDTH**2 + 2 * every * (image + TOKENS) * WIDTH)


def results() -> list[Result]:
    found = []
    for name in NAMES:
        network = transformer(name)
        for side in SIDES:
            bare = counted(network, side, adapted=False)
            more = counted(network, side, adapted=True) - bare
            title = f"arithmetic, {name}, {side} x {side}:"
            found.append(Result(f"{title} teraoperations of the bare host's call", bare / 1e12, ""))
            found.append(Result(f"{title} more with the adapter, of them", more / bare, ""))
            found.append(Result(f"{title} more, of what its form asks for", more / reckoned(name, side), "", 1.0))
    return found


def main() -> None:
    chosen = parser(__doc__).parse_args()
    host.start()
    found = results()
    results_table("Arithmetic of one model call, a row", found)
    write(found, chosen.json)


if __name__ == "__main__":
    main()
