"""Load Reference."""

from dataclasses import replace
from pathlib import Path

from comfy_api.latest import io

from ..ipadapter_instruct_core import reference as references
from .host import folders
from .host.memory import intermediate
from .schema import supported
from .types import CATEGORY, Reference


class LoadReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return supported(
            io.Schema,
            node_id="IPAdapterInstructLoadReference",
            display_name="Load Reference",
            category=CATEGORY,
            description="Loads a reference that Save Reference has kept. It needs no picture, no CLIP vision and no "
            "CLIP, only the adapter that it was made with.",
            search_aliases=["ip-adapter", "load embeds", "reference image"],
            inputs=[
                io.Combo.Input(
                    "reference_name",
                    options=folders.reference_names(),
                    tooltip="A file of models/ipadapter_instruct_references.",
                )
            ],
            outputs=[Reference.Output(display_name="reference")],
        )

    @classmethod
    def validate_inputs(cls, reference_name: str | None = None) -> bool | str:
        """In place of the host's "value not in list", which names no folder; None where the name comes by a link."""
        return folders.problem(folders.reference_path, reference_name) or True

    @classmethod
    def fingerprint_inputs(cls, reference_name: str | None = None) -> str:
        """A file that was replaced under its name is loaded anew."""
        return folders.fingerprint(folders.reference_path, reference_name)

    @classmethod
    def execute(cls, reference_name: str) -> io.NodeOutput:
        loaded = references.load(Path(folders.reference_path(reference_name)))
        tokens = {row: intermediate(each) for row, each in loaded.tokens.items()}
        shares = None if loaded.shares is None else intermediate(loaded.shares)
        return io.NodeOutput(replace(loaded, tokens=tokens, shares=shares))
