"""The kinds of links between our nodes. Names are part of saved workflows and never change."""

from comfy_api.latest import io

CATEGORY = "IPAdapter-Instruct"

Adapter = io.Custom("IPADAPTER_INSTRUCT")
Instruction = io.Custom("IPADAPTER_INSTRUCTION")
OpenClip = io.Custom("IPADAPTER_INSTRUCT_OPEN_CLIP")
