"""Save Reference."""

from comfy_api.latest import io

from ..ipadapter_instruct_core import reference as references
from .host import folders, log
from .schema import supported
from .types import CATEGORY, Reference


class SaveReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return supported(
            io.Schema,
            node_id="IPAdapterInstructSaveReference",
            display_name="Save Reference",
            category=CATEGORY,
            description="Keeps a reference in a small file of models/ipadapter_instruct_references. Load Reference "
            "reads it without the picture, CLIP vision and CLIP.",
            is_output_node=True,
            search_aliases=["ip-adapter", "save embeds", "reference image"],
            inputs=[
                Reference.Input("reference", tooltip="From Encode Reference or Combine References."),
                io.String.Input(
                    "filename_prefix",
                    default="reference",
                    tooltip="The file's name, to which a number is added; a / makes a folder (styles/oil).",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, reference: references.EncodedReference, filename_prefix: str) -> io.NodeOutput:
        path = folders.new_reference_path(filename_prefix)
        references.save(path, reference)
        log.info("The reference is saved as %s; press R to see it in Load Reference.", path)
        return io.NodeOutput(ui={"text": [path.name]})
