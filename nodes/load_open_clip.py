"""Load OpenCLIP Model, for adapters whose instructions are not read by CLIP-L."""

from comfy_api.latest import io

from .host import folders, memory
from .types import CATEGORY, OpenClip


class LoadOpenClip(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IPAdapterInstructOpenCLIPLoader",
            display_name="Load OpenCLIP Model (IPAdapter-Instruct)",
            category=CATEGORY,
            description="Loads a whole OpenCLIP model (image and text tower) for adapters trained with one. "
            "It serves as clip in Encode Instruction and as clip_vision in Apply IPAdapter-Instruct.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folders.open_clip_names(),
                    tooltip="A file of models/clip_vision, models/text_encoders or models/ipadapter_instruct. "
                    "A .json of the same name beside it holds its configuration; without one it is ViT-H/14.",
                )
            ],
            outputs=[OpenClip.Output(display_name="open_clip")],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None) -> bool | str:
        """In place of the host's "value not in list", which names no folder; None where the name comes by a link."""
        return folders.problem(folders.open_clip_path, model_name) or True

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None = None) -> str:
        """A file that was replaced under its name is loaded anew."""
        return folders.fingerprint(folders.open_clip_path, model_name)

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        return io.NodeOutput(memory.load_hosted_open_clip(folders.open_clip_path(model_name), model_name))
