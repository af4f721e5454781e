"""IPAdapter-Instruct for ComfyUI: a picture, and in words what to take from it.

Importing this package imports nothing: the host calls `comfy_entrypoint` for the nodes.
"""

from typing import Any

WEB_DIRECTORY = "./web"
__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint() -> Any:
    """Called by ComfyUI (V3 schema) at start."""
    from comfy_api.latest import ComfyExtension

    from . import nodes

    class IPAdapterInstruct(ComfyExtension):
        async def get_node_list(self) -> list:
            return nodes.NODES

    return IPAdapterInstruct()
