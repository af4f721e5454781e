"""The blueprints that the pack ships: one node for a beginner each, which opens into the graph inside.

`python -m tools.workflows.shipped` writes them as subgraphs/*.json, where newer hosts list them by their file's name.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable

from .canvas import GROUP_GAP, OUR_ID, SEED_CONTROL, SLOT, Canvas, Json, Output
from .files import POSE_NET
from .parts import (
    LOADER_WIDTH,
    NEGATIVE,
    NODE_WIDTH,
    TEXT_WIDTH,
    apply_instruction,
    hold_on_to,
    load_controlnet,
    load_released,
    sampled_picture,
    take_from_picture,
)
from .wires import led_round

# What the page calls the two ends inside: the node's own inputs, and its output.
INPUTS, OUTPUTS = -10, -20
ENDS_WIDTH = 200
CATEGORY = "IPAdapter-Instruct"
APPLY, WORDS = "IPAdapterInstructApply", "IPAdapterInstructEncode"


class Blueprint(Canvas):
    """The graph inside one node: a canvas whose links may come from that node's own inputs."""

    def __init__(self, name: str, schemas: Json):
        super().__init__(f"subgraphs/{name}", schemas)
        self._name = name
        self._inputs: list[Json] = []  # of the node: {"name", "label", "type", "linkIds"}
        self._values: dict[str, object] = {}  # of those that are widgets

    def socket(self, name: str, kind: str, label: str) -> Output:
        """An input of the node for a link."""
        self._inputs.append({"id": self._uuid(name), "name": name, "type": kind, "label": label, "linkIds": []})
        return Output(INPUTS, len(self._inputs) - 1, kind)

    def widget(self, name: str, label: str, kind: str, inside: str, which: slice = slice(None)) -> None:
        """An input of the node that stands for one inside, of every node of a kind or of ``which`` of them."""
        source = None
        for node in [node for node in self._nodes if node["type"] == kind][which]:
            slot, entry = next((i, entry) for i, entry in enumerate(node["inputs"]) if entry["name"] == inside)
            if source is None:
                source = self.socket(name, entry["type"], label)
                self._values[name] = self.widget_value(node, inside)
            entry["link"] = self._link(source, node["id"], slot)

    def _ends(self, source: Output) -> list[int]:
        return self._inputs[source.slot]["linkIds"] if source.node == INPUTS else super()._ends(source)

    def _uuid(self, part: str) -> str:
        return str(uuid.uuid5(uuid.UUID(self._id), part))

    def file(self, picture: Output, description: str, searched_by: list[str]) -> Json:
        """The blueprint's file, for the output that its node gives."""
        output, last = (
            {"id": self._uuid("IMAGE"), "name": "IMAGE", "type": picture.kind},
            self._link(picture, OUTPUTS, 0),
        )
        whole, definition = self.workflow(), self._uuid("definition")
        led = {end["id"]: {"parentId": end["parentId"]} for end in whole["extra"]["linkExtensions"]}
        keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        (sampler,) = (str(node["id"]) for node in self._nodes if node["type"] == "KSampler")
        inside = {
            "id": definition,
            "version": 1,
            "state": {
                "lastGroupId": len(self._groups),
                "lastNodeId": len(self._nodes),
                "lastLinkId": last,
                "lastRerouteId": 0,
            },
            "revision": 0,
            "config": {},
            "name": self._name,
            "description": description,
            "category": CATEGORY,
            "inputNode": {"id": INPUTS, "bounding": self._bounding(INPUTS)},
            "outputNode": {"id": OUTPUTS, "bounding": self._bounding(OUTPUTS)},
            "inputs": self._inputs,
            "outputs": [{**output, "linkIds": [last]}],
            "widgets": [],
            "nodes": whole["nodes"],
            "groups": whole["groups"],
            "links": [dict(zip(keys, link, strict=True)) | led.get(link[0], {}) for link in whole["links"]],
            "reroutes": whole["extra"]["reroutes"],
            "extra": {},
        }
        node = {
            "id": len(self._nodes) + 1,
            "type": definition,
            "pos": [0, 0],
            "size": [400, 520],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [self._outer(entry) for entry in self._inputs],
            "outputs": [{"name": "IMAGE", "type": picture.kind, "links": None}],
            "properties": {
                "proxyWidgets": [
                    *(["-1", name] for name in self._values),
                    *([sampler, name] for name in ("seed", SEED_CONTROL)),
                ],
                "cnr_id": OUR_ID,
            },
            "widgets_values": [*self._values.values(), None, None],
            "title": self._name,
        }
        return {
            "id": self._id,
            "revision": 0,
            "last_node_id": node["id"],
            "last_link_id": 0,
            "nodes": [node],
            "links": [],
            "version": 0.4,
            "definitions": {"subgraphs": [inside]},
            "extra": {"BlueprintDescription": description, "BlueprintSearchAliases": searched_by},
        }

    def _bounding(self, end: int) -> list[int]:
        """Where an end stands: left of the first group, or right of the last, with a row for each slot."""
        if end == INPUTS:
            return [-ENDS_WIDTH - GROUP_GAP, 0, ENDS_WIDTH, (len(self._inputs) + 2) * SLOT]
        left, _, width, _ = self._groups[-1]["bounding"]
        return [left + width + GROUP_GAP, 0, ENDS_WIDTH // 2, 3 * SLOT]

    def _reroutes(self) -> Json:
        ends = []
        for end in (INPUTS, OUTPUTS):
            x, y, width, height = self._bounding(end)
            ends.append({"id": end, "pos": [x, y + SLOT // 2], "size": [width, height], "flags": {}})
        rows = self._rows | {(OUTPUTS, 0): SLOT}
        return led_round([*self._nodes, *ends], self._groups, self._links, rows)

    def _outer(self, entry: Json) -> Json:
        widget = {"widget": {"name": entry["name"]}} if entry["name"] in self._values else {}
        return {"name": entry["name"], "label": entry["label"], "type": entry["type"], "link": None, **widget}


def style_of_a_picture(canvas: Blueprint) -> Output:
    image = canvas.socket("image", "IMAGE", "style of this")
    with canvas.column("Models", "models", LOADER_WIDTH):
        models = load_released(canvas)
    adapted = take_from_picture(canvas, models, "a red fox sitting in a forest", image, "style")
    expose_prompts(canvas)
    canvas.widget("weight", "weight", APPLY, "weight")
    return sampled_picture(canvas, models, adapted)


def style_of_a_composition_of_b(canvas: Blueprint) -> Output:
    a, b = canvas.socket("image_a", "IMAGE", "A: style"), canvas.socket("image_b", "IMAGE", "B: composition")
    with canvas.column("Models", "models", LOADER_WIDTH):
        models = load_released(canvas)
    prompt = "a king in a golden robe before a castle"
    styled = take_from_picture(canvas, models, prompt, a, "style")
    with canvas.column("What to take from the second", "adapter", TEXT_WIDTH):
        both = apply_instruction(canvas, models._replace(model=styled.model), (prompt, NEGATIVE), "composition", "", b)
    expose_prompts(canvas)
    canvas.widget("weight_a", "weight of A", APPLY, "weight", slice(0, 1))
    canvas.widget("weight_b", "weight of B", APPLY, "weight", slice(1, 2))
    return sampled_picture(canvas, models, styled._replace(model=both.model))


def face_with_pose(canvas: Blueprint) -> Output:
    image, pose = (
        canvas.socket("image", "IMAGE", "face of this"),
        canvas.socket("pose", "IMAGE", "pose (OpenPose figure)"),
    )
    with canvas.column("Models", "models", LOADER_WIDTH):
        models, net = load_released(canvas), load_controlnet(canvas, POSE_NET)
    adapted = take_from_picture(canvas, models, "a woman waving on a beach, photograph", image, "face")
    with canvas.column("What to hold on to", "control", NODE_WIDTH):
        held = hold_on_to(canvas, adapted, net, pose)
    expose_prompts(canvas)
    canvas.widget("weight", "weight of the face", APPLY, "weight")
    canvas.widget("strength", "strength of the pose", "ControlNetApplyAdvanced", "strength")
    return sampled_picture(canvas, models, held)


def expose_prompts(canvas: Blueprint) -> None:
    canvas.widget("prompt", "prompt", WORDS, "prompt")
    canvas.widget("negative_prompt", "negative prompt", WORDS, "negative_prompt")


def expose_size_and_files(canvas: Blueprint) -> None:
    for side in ("width", "height"):
        canvas.widget(side, side, "EmptyLatentImage", side)
    for name, label, kind in (
        ("ckpt_name", "checkpoint", "CheckpointLoaderSimple"),
        ("adapter_name", "adapter", "IPAdapterInstructModelLoader"),
        ("clip_name", "CLIP vision", "CLIPVisionLoader"),
        ("control_net_name", "ControlNet", "ControlNetLoader"),
    ):
        canvas.widget(name, label, kind, name)


FROM_A_PICTURE = ["ip-adapter", "reference image", "image prompt"]
# By its file's stem, which is the node's name in the page: what draws it, its description, and other words to find it.
BLUEPRINTS: dict[str, tuple[Callable[[Blueprint], Output], str, list[str]]] = {
    "Style of a picture": (
        style_of_a_picture,
        "Paints what the prompt says in the style of a picture, on SD1.5.",
        [*FROM_A_PICTURE, "style transfer"],
    ),
    "Style of A, composition of B": (
        style_of_a_composition_of_b,
        "Paints what the prompt says in the style of picture A, laid out as picture B, on SD1.5.",
        [*FROM_A_PICTURE, "style transfer", "layout"],
    ),
    "Face with pose": (
        face_with_pose,
        "The person of a picture in a new scene and in the pose of a figure, by an OpenPose ControlNet, on SD1.5.",
        [*FROM_A_PICTURE, "portrait", "ControlNet", "OpenPose"],
    ),
}


def build_blueprints(schemas: Json) -> dict[str, Json]:
    """Every shipped blueprint by its file's stem, for a host's /object_info."""
    files = {}
    for name, (draw, description, searched_by) in BLUEPRINTS.items():
        canvas = Blueprint(name, schemas)
        picture = draw(canvas)
        expose_size_and_files(canvas)
        files[name] = canvas.file(picture, description, searched_by)
    return files
