"""The files that the shipped workflows load, and the notes in them on where these come from."""

from __future__ import annotations

from .canvas import Json

CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
ADAPTER = "ip-adapter-instruct-sd15.bin"
VISION = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"
SCRIBBLE_NET, POSE_NET = "control_v11p_sd15_scribble_fp16.safetensors", "control_v11p_sd15_openpose_fp16.safetensors"
SD3_CHECKPOINT, SD3_ADAPTER = "sd3_medium_incl_clips_t5xxlfp8.safetensors", "ip-adapter-instruct-sd3.bin"
SD3_CANNY_NET = "sd3_controlnet_canny.safetensors"
LORA = "pixel_art_style_sd15.safetensors"
# For an adapter of one's own, which training writes, and the baseline without instructions that it is compared with.
OWN_ADAPTER, PLAIN_ADAPTER = "my_adapter.safetensors", "ip-adapter-plus_sd15.safetensors"
OPEN_CLIP = "open_clip_model.safetensors"

HUB = "https://huggingface.co/{}/resolve/main/{}"
CHECKPOINT_HUB, CONTROL_HUB = (
    "Comfy-Org/stable-diffusion-v1-5-archive",
    "comfyanonymous/ControlNet-v1-1_fp16_safetensors",
)
SD3_HUB, SD3_CANNY_HUB = "stabilityai/stable-diffusion-3-medium", "InstantX/SD3-Controlnet-Canny"
ADAPTERS_HUB, OPEN_CLIP_HUB = "h94/IP-Adapter", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CHECKPOINT_FILE = f"""\
Put these into ComfyUI's *models* folder, then press **R**.

**checkpoints**
- {CHECKPOINT}
- Hugging Face: {CHECKPOINT_HUB}
- or any other SD1.5 checkpoint

"""
VISION_FILE = f"""\
**clip_vision**
- {VISION}
- Hugging Face: {ADAPTERS_HUB}, where it is models/image_encoder/model.safetensors: rename it
"""
FILES = f"""\
{CHECKPOINT_FILE}\
**ipadapter_instruct**
- {ADAPTER}
- Hugging Face: CiaraRowles/IP-Adapter-Instruct

{VISION_FILE}"""
SD3_FILES = f"""\
Put these into ComfyUI's *models* folder, then press **R**.

**checkpoints**
- {SD3_CHECKPOINT}
- Hugging Face: {SD3_HUB}, after agreeing to its licence
- SD3 medium only: the adapter was not trained for SD3.5

**ipadapter_instruct**
- {SD3_ADAPTER}
- Hugging Face: CiaraRowles/IP-Adapter-Instruct

{VISION_FILE}"""
SD3_CANNY_FILES = f"""
**controlnet**
- {SD3_CANNY_NET}
- Hugging Face: {SD3_CANNY_HUB}, where it is diffusion_pytorch_model.safetensors: rename it
"""
OWN_FILES = f"""\
{CHECKPOINT_FILE}\
**ipadapter_instruct**
- {OWN_ADAPTER}: what *python -m training export* wrote, or choose yours in Load IPAdapter-Instruct Model

**clip_vision**
- {OPEN_CLIP}, or the OpenCLIP model that your adapter was trained with and its .json
- Hugging Face: {OPEN_CLIP_HUB}
"""
PLAIN_FILES = (
    f"\n**ipadapter_instruct**, for comparison\n- {PLAIN_ADAPTER}\n- Hugging Face: {ADAPTERS_HUB}, in models\n"
)
CONTROL_FILES = f"\n**controlnet**\n- {{}}\n- Hugging Face: {CONTROL_HUB}\n"
LORA_FILES = f"\n**loras**\n- any SD1.5 LoRA: choose yours in Load LoRA in place of {LORA}\n"
PICTURES = """
**Pictures** are in the pack's folder *workflows/inputs*: *choose file to upload* takes them, or your own.
"""

# Everything that the workflows name, by its folder of ComfyUI's `models`.
PLACES = {
    "checkpoints": [CHECKPOINT, SD3_CHECKPOINT],
    "ipadapter_instruct": [ADAPTER, SD3_ADAPTER, OWN_ADAPTER, PLAIN_ADAPTER],
    "clip_vision": [VISION, OPEN_CLIP],
    "controlnet": [SCRIBBLE_NET, POSE_NET, SD3_CANNY_NET],
    "loras": [LORA],
}


def on_hub(name: str, folder: str, repository: str, path: str = "") -> Json:
    """What the page needs to offer a missing file; it takes .safetensors only, so not the released adapter."""
    return {"name": name, "url": HUB.format(repository, path or name), "directory": folder}
