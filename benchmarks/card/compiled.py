"""The pack under the host's compile node: its compiled steps beside the bare host's compiled ones."""

from __future__ import annotations

import time

import torch

from .. import host
from ..report import Result
from .fast import LATENT, NAMES, compare
from .part import from_command_line


def main() -> None:
    part = from_command_line(__doc__)
    host.start()
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    backend = "inductor" if part.on_card else "eager"
    dtype = torch.float16 if part.on_card else torch.float32
    latent = 16 if part.small else LATENT["sd15"]
    model = host.random_model("sd15", dtype, 32 if part.small else 320)
    with torch.inference_mode():
        ours = host.Ours(model)
        given = {"bare host, compiled": model, "ours, simple, compiled": ours.apply()}
        compiled = {name: TorchCompileModel.execute(each, backend).result[0] for name, each in given.items()}
        for name, each in compiled.items():
            begun = time.perf_counter()
            host.sample(each, latent, 2)
            seconds = time.perf_counter() - begun
            part.lines.add(Result(f"{NAMES['sd15']}: {name}: the first two steps, {backend}", seconds, "s"))
            part.lines.add(Result(f"{NAMES['sd15']}: {name}: graphs", float(graphs()), ""))
        compare(part, f"{NAMES['sd15']}, {backend}", compiled | {"bare host": model}, latent, 1)


def graphs() -> int:
    """How many graphs dynamo has made since it was last asked."""
    from torch._dynamo.utils import counters

    found = counters["stats"]["unique_graphs"]
    counters.clear()
    return found


if __name__ == "__main__":
    main()
