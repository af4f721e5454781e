"""Load IPAdapter-Instruct Model."""

from comfy_api.latest import io

from .host import folders, memory
from .schema import supported
from .types import CATEGORY, Adapter


class LoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return supported(
            io.Schema,
            node_id="IPAdapterInstructModelLoader",
            display_name="Load IPAdapter-Instruct Model",
            category=CATEGORY,
            description="Loads an IPAdapter-Instruct file, or IPAdapter-Plus as a baseline without instructions.",
            search_aliases=["ip-adapter", "style transfer"],
            inputs=[
                io.Combo.Input(
                    "adapter_name",
                    options=folders.adapter_names(),
                    tooltip="A file of models/ipadapter_instruct, or one of models/ipadapter that fits.",
                )
            ],
            outputs=[Adapter.Output(display_name="adapter")],
        )

    @classmethod
    def validate_inputs(cls, adapter_name: str | None = None) -> bool | str:
        """In place of the host's "value not in list", which names no folder; None where the name comes by a link."""
        return folders.problem(folders.adapter_path, adapter_name) or True

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str | None = None) -> str:
        """A file that was replaced under its name is loaded anew."""
        return folders.fingerprint(folders.adapter_path, adapter_name)

    @classmethod
    def execute(cls, adapter_name: str) -> io.NodeOutput:
        return io.NodeOutput(memory.load_adapter(folders.adapter_path(adapter_name), adapter_name))
