"""Prints how many seconds the host takes to load a pack: `python -m benchmarks.start_up FOLDER`.

The host's own loader does it, in a process where all the host's nodes are loaded, as they are by then at its start.
"""

from __future__ import annotations

import asyncio
import sys
import time

from . import host


async def load(folder: str) -> float:
    import nodes

    # Its other nodes bring further modules with them, which by then cost a pack nothing.
    await nodes.init_builtin_extra_nodes()
    begun = time.perf_counter()
    loaded = await nodes.load_custom_node(folder)
    seconds = time.perf_counter() - begun
    if not loaded:
        raise SystemExit(f"The host could not load {folder}; its message is above.")
    return seconds


def main() -> None:
    inside = host.prepare()
    import torch
    from tools.setup.torchvision_cpu import ensure_torchvision_imports

    ensure_torchvision_imports()
    import comfy.cli_args

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    assert inside.PACK not in sys.modules, "the pack must be new to this process"
    print(asyncio.run(load(sys.argv[1])))


if __name__ == "__main__":
    main()
