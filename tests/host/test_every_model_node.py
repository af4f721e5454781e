"""Beside every node of the host that takes a MODEL and gives one, in either order, with the node's own defaults.

What is right is told without knowing what a node does: three-way guidance whose scales are next to cfg is next to
simple guidance, of four rows though it is, and other scales are something else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import torch
from bench import CFG, Bench, ThreeWay
from beside import ORDERS, Patch, in_order, sampled

NEXT_TO = 1e-3
PLAIN = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}
BY_LOT = {"TomePatchModel"}  # merges other tokens each time
# Of one latent or of all: where scales next to the sampler's cfg are next to nothing.
AT_CFG_1 = {"CFGOverride", "VideoLinearCFGGuidance", "VideoTriangleCFGGuidance"}
COMPILERS = {"TorchCompileModel"}  # of which test_compile.py knows more


def nodes_of_models() -> Iterator[tuple[str, Patch]]:
    """The host's nodes whose inputs are a MODEL and widgets, each as a function of a MODEL."""
    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())
    for name, kind in sorted(nodes.NODE_CLASS_MAPPINGS.items()):
        required = kind.INPUT_TYPES().get("required", {})
        models = [key for key, spec in required.items() if spec[0] == "MODEL"]
        widgets = {key: default_of(*spec) for key, spec in required.items() if spec[0] != "MODEL"}
        if len(models) == 1 and tuple(kind.RETURN_TYPES)[:1] == ("MODEL",) and None not in widgets.values():
            yield name, patch_of(kind, models[0], widgets)


def default_of(kind: Any, options: dict = {}, *_: Any) -> Any:
    """None for what is no widget, or a list of files, of which there are none."""
    choices = kind if isinstance(kind, list) else options.get("options") if kind == "COMBO" else None
    return options.get("default", choices[0] if choices else PLAIN.get(kind) if isinstance(kind, str) else None)


def patch_of(kind: Any, model_input: str, widgets: dict[str, Any]) -> Patch:
    def patch(model: Any) -> Any:
        given = getattr(kind(), kind.FUNCTION)(**{model_input: model}, **widgets)
        return getattr(given, "result", given)[0]

    return patch


def away(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_three_way_guidance_beside_every_node_that_patches_a_model(bench: Bench) -> None:
    found, faults = [], []
    for name, patch in nodes_of_models():
        if name in BY_LOT | COMPILERS:
            continue
        try:
            sampled(bench, patch(bench.model))
        except Exception:  # it is for other models, or wants other widgets
            continue
        found.append(name)
        for order in ORDERS:
            simple, near, far = (
                sampled(bench, in_order(bench, order, patch, bench.application(three_way=scales)))
                for scales in (None, ThreeWay(CFG + NEXT_TO, CFG - NEXT_TO), ThreeWay(2.0, 1.5))
            )
            if name not in AT_CFG_1 and not (away(near, simple) < 1e-2 and away(far, simple) > 1e-3):
                faults.append(
                    f"{name} {order}: {away(near, simple):.1e} from simple, {away(far, simple):.1e} elsewhere"
                )
    assert {"FreeU_V2", "PerturbedAttentionGuidance", "RescaleCFG", "SkipLayerGuidanceDiTSimple"} <= {*found}
    assert not faults, "\n".join(faults)
