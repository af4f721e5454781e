"""Label Sheet: the pictures of a list as one, each with its label."""

from comfy_api.latest import io
from torch import Tensor

from .host.vision import checked_pictures
from .schema import supported
from .sheet import Cell, sheet_of
from .types import CATEGORY

MOST_PICTURES = 256


class LabelSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return supported(
            io.Schema,
            node_id="IPAdapterInstructLabelSheet",
            display_name="Label Sheet",
            category=CATEGORY,
            description="Makes one picture of the results of a list, each with its label below it and the reference "
            "at their left.",
            search_aliases=["contact sheet", "grid", "compare", "xy plot"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="The results: of a list, of a batch, or both."),
                io.Int.Input(
                    "columns",
                    default=0,
                    min=0,
                    max=32,
                    tooltip="How many pictures stand side by side; 0 puts all of them into one row.",
                ),
                io.String.Input(
                    "label",
                    default="",
                    optional=True,
                    force_input=True,
                    tooltip="A label for each of the list, as All Tasks gives them.",
                ),
                io.Image.Input("reference", optional=True, tooltip="The reference picture, shown at the left."),
            ],
            outputs=[io.Image.Output(display_name="image")],
        )

    @classmethod
    def execute(
        cls,
        images: list[Tensor],
        columns: list[int],
        label: list[str] | None = None,
        reference: list[Tensor] | None = None,
    ) -> io.NodeOutput:
        labels = [text for text in label or [] if text is not None] or [""]
        cells = [
            Cell(picture, labels[min(place, len(labels) - 1)])  # the last one goes on, as in the host's lists
            for place, batch in enumerate(images)
            for picture in checked_pictures(batch)
        ]
        if not cells:
            raise ValueError("There is no picture for the sheet: the list is empty; connect the results of a list.")
        if len(cells) > MOST_PICTURES:
            raise ValueError(
                f"A sheet holds {MOST_PICTURES} pictures at most, and there are {len(cells)}; make fewer at a time."
            )
        given = [batch for batch in reference or [] if batch is not None]
        left = Cell(checked_pictures(given[0])[0], "reference") if given else None
        return io.NodeOutput(sheet_of(cells, columns[0] or len(cells), left))
