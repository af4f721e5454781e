"""Writes ComfyUI workflows in the page's own format: named inputs in, numbered links and widget lists out.

Nodes are stacked in columns, one coloured group a column, so that nothing overlaps and the graph reads left to right.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .wires import GROWTH, SLOT, TITLE, led_round

Json = dict[str, Any]

# The id in the node registry decides which pack the page offers for a node that is missing.
OUR_ID, OUR_PREFIX = "ipadapter-instruct", "IPAdapterInstruct"
CORE_ID = "comfy-core"
SEED_CONTROL = "control_after_generate"  # the page's own widget beside a seed
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
OPTIONAL_SHAPE = 7  # the page draws an input that may stay empty as a ring

# The page's own measures, in pixels of its canvas: those of its newer design (Nodes 2.0), which needs more room.
WIDGET, TEXT_BOX, MARGIN = 28, 84, 14
BADGE = 24  # the newer design's line with a pack's name, at the foot of its nodes
GAP, GROUP_TITLE, GROUP_PADDING, GROUP_GAP = 84, 46, 16, 70
PICTURE_HEIGHT = 330  # what a node needs to show a picture below its widgets
GROUP_COLOURS = {
    "models": "#3f789e",
    "text": "#8a6d3b",
    "adapter": "#5b8c5a",
    "control": "#8b5a8c",
    "picture": "#a14f4f",
}
NOTE_LETTER, NOTE_LINE, NOTE_ITEM, NOTE_MARGIN = 6.6, 17, 26, 60
NOTE_COLOURS = {"color": "#432", "bgcolor": "#653"}


@dataclass(frozen=True)
class Output:
    """One output of a node, as the source of a link."""

    node: int
    slot: int
    kind: str


@dataclass(frozen=True)
class Node:
    """A placed node; `node["MODEL"]` is its output of that name."""

    id: int
    outputs: dict[str, Output]

    def __getitem__(self, name: str) -> Output:
        return self.outputs[name]

    @property
    def only(self) -> Output:
        (output,) = self.outputs.values()
        return output


@dataclass(frozen=True)
class _Input:
    name: str
    kind: str
    options: Json
    optional: bool

    @property
    def is_widget(self) -> bool:
        return self.kind in WIDGET_TYPES and not self.options.get("forceInput")

    @property
    def height(self) -> int:
        if not self.is_widget:
            return 0
        return TEXT_BOX if self.options.get("multiline") else WIDGET * len(self.values({}))

    def values(self, given: Json) -> list[Any]:
        """What the page keeps for this widget; two kinds bring a companion."""
        value = given.get(self.name)
        if value is None or isinstance(value, Output):
            value = self.options.get("default", "")
        if self.options.get(SEED_CONTROL):
            return [value, given.get(SEED_CONTROL, "fixed")]
        return [value, "image"] if self.options.get("image_upload") else [value]


class Canvas:
    """One workflow in the making.

    Args:
        name: its file's stem, from which its id follows.
        schemas: the host's /object_info.
    """

    def __init__(self, name: str, schemas: Json):
        # By what the pack was called when they were first made: a workflow keeps its id.
        self._id = str(uuid.uuid5(uuid.NAMESPACE_URL, f"comfyui-ipadapter-instruct/{name}"))
        self._schemas = schemas
        self._nodes: list[Json] = []
        self._links: list[list[Any]] = []
        self._groups: list[Json] = []
        self._rows: dict[tuple[int, int], float] = {}  # of inputs, by node and slot
        self._x, self._y, self._width = 0, 0, 0

    @contextmanager
    def column(self, title: str, colour: str, width: int, below: bool = False) -> Iterator[None]:
        """A group whose nodes are stacked, right of the last column or ``below`` it."""
        top = 0
        if below:
            self._x, above, previous_width, previous_height = self._groups[-1]["bounding"]
            top, width = above + previous_height + GROUP_GAP, previous_width - 2 * GROUP_PADDING
        first, self._y, self._width = len(self._nodes), top + GROUP_TITLE + TITLE, width
        self._x += GROUP_PADDING
        yield
        height = max(node["pos"][1] + node["size"][1] for node in self._nodes[first:]) + GROWTH - top + GROUP_PADDING
        bounding = [self._x - GROUP_PADDING, top, width + 2 * GROUP_PADDING, height]
        group = {"id": len(self._groups) + 1, "title": title, "bounding": bounding, "color": GROUP_COLOURS[colour]}
        self._groups.append({**group, "font_size": 24, "flags": {}})
        self._x += width + GROUP_PADDING + GROUP_GAP

    def node(
        self,
        kind: str,
        title: str = "",
        tall: int = 0,
        models: Json | None = None,
        **given: Any,
    ) -> Node:
        """Place a node in the column, below the last one.

        Args:
            tall: more than its slots and widgets need, e.g. for a picture.
            models: metadata of the file that it loads, so that the page can offer it.
            given: an Output for a link, anything else for a widget; the host's default where nothing is given.
        """
        schema, number = self._schemas[kind], len(self._nodes) + 1
        inputs = list(_inputs(schema))
        unknown = given.keys() - {declared.name for declared in inputs} - {SEED_CONTROL}
        assert not unknown, f"{kind} has no {unknown}"
        sockets = [declared for declared in inputs if not declared.is_widget]
        widgets = [declared for declared in inputs if declared.is_widget]
        ours = kind.startswith(OUR_PREFIX)
        properties = {"cnr_id": OUR_ID if ours else CORE_ID, "Node name for S&R": kind}
        slots = SLOT * max(len(sockets), len(schema["output"]))
        needed = slots + sum(widget.height for widget in widgets) + MARGIN + (BADGE if ours else 0)
        placed = {
            **self._frame(kind, title, max(needed, tall)),
            "inputs": [self._input(number, slot, d, given) for slot, d in enumerate([*sockets, *widgets])],
            "outputs": [
                {"name": name, "type": output, "links": []}
                for name, output in zip(schema["output_name"], schema["output"], strict=True)
            ],
            "properties": properties | ({"models": [models]} if models else {}),
            "widgets_values": [value for widget in widgets for value in widget.values(given)],
        }
        self._nodes.append(placed)
        y = slots
        for slot, declared in enumerate([*sockets, *widgets]):
            self._rows[number, slot] = y + SLOT if declared.is_widget else SLOT * (slot + 0.7)
            y += declared.height
        return Node(number, {o["name"]: Output(number, slot, o["type"]) for slot, o in enumerate(placed["outputs"])})

    def widget_value(self, node: Json, name: str) -> Any:
        """What a placed node's widget is set to."""
        values = iter(node["widgets_values"])
        for declared in _inputs(self._schemas[node["type"]]):
            if declared.is_widget:
                value, *_ = [next(values) for _ in declared.values({})]
                if declared.name == name:
                    return value
        raise AssertionError(f"{node['type']} has no widget {name}")

    def note(self, title: str, text: str) -> None:
        """Place a note in Markdown, in the column's width and as tall as its text."""
        letters = self._width / NOTE_LETTER
        lines = [(math.ceil(max(len(line), 1) / letters), line[:1] in ("-", "*")) for line in text.splitlines()]
        height = sum(count * (NOTE_ITEM if item else NOTE_LINE) for count, item in lines)
        frame = self._frame("MarkdownNote", title, NOTE_MARGIN + height)
        empty = {"inputs": [], "outputs": [], "properties": {}}
        self._nodes.append({**frame, **empty, "widgets_values": [text], **NOTE_COLOURS})

    def _frame(self, kind: str, title: str, height: int) -> Json:
        frame = {
            "id": len(self._nodes) + 1,
            "type": kind,
            "pos": [self._x, self._y],
            "size": [self._width, height],
            "flags": {},
            "order": len(self._nodes),
            "mode": 0,
        }
        self._y += height + TITLE + GAP
        return frame | ({"title": title} if title else {})

    def _input(self, node: int, slot: int, declared: _Input, given: Json) -> Json:
        entry: Json = {"name": declared.name, "type": declared.kind, "link": None}
        if declared.optional and not declared.is_widget:
            entry["shape"] = OPTIONAL_SHAPE
        if declared.is_widget:
            entry["widget"] = {"name": declared.name}
        source = given.get(declared.name)
        if isinstance(source, Output):
            entry["link"] = self._link(source, node, slot)
        else:
            assert declared.is_widget or declared.optional, f"{declared.name} is not connected"
        return entry

    def _link(self, source: Output, node: int, slot: int) -> int:
        """Links an output to a node's input; returns the link's id."""
        self._links.append([len(self._links) + 1, source.node, source.slot, node, slot, source.kind])
        self._ends(source).append(len(self._links))
        return len(self._links)

    def _ends(self, source: Output) -> list[int]:
        """The ids of the links that leave an output."""
        return self._nodes[source.node - 1]["outputs"][source.slot]["links"]

    def _reroutes(self) -> Json:
        return led_round(self._nodes, self._groups, self._links, self._rows)

    def workflow(self) -> Json:
        return {
            "id": self._id,
            "revision": 0,
            "last_node_id": len(self._nodes),
            "last_link_id": len(self._links),
            "nodes": self._nodes,
            "links": self._links,
            "groups": self._groups,
            "config": {},
            "extra": self._reroutes(),
            "version": 0.4,
        }


def _inputs(schema: Json) -> Iterator[_Input]:
    for part in ("required", "optional"):
        for name in schema["input_order"].get(part, []):
            kind, *options = schema["input"][part][name]
            kind = kind if isinstance(kind, str) else "COMBO"  # older nodes declare a choice by its options
            yield _Input(name, kind, options[0] if options else {}, part == "optional")
