"""Shipped workflows (the page's format) as graphs that can be queued over HTTP (the API format)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tools.host.graphs import Graph, node
from tools.setup.install import ROOT

Json = dict[str, Any]
WORKFLOWS = ROOT / "workflows"
OURS = "IPAdapterInstruct"
NOT_RUN = {"MarkdownNote", "Note", "PrimitiveNode", "Reroute"}


@dataclass(frozen=True)
class Picture:
    """A graph to run, and the name of its picture."""

    name: str
    graph: Graph


@dataclass(frozen=True)
class Demo:
    """What is run on which weights, and how it is shown.

    Attributes:
        about: of the weights, for the person who is waiting.
        models: a ComfyUI `models` folder.
        workflows: the shipped files that are run, by their stem.
        inputs: pictures that these load.
        planned: workflows as graphs -> the pictures to make.
        sheet: pictures and graphs by the picture's name -> the contact sheet.
    """

    about: str
    models: Path
    workflows: tuple[str, ...]
    inputs: list[Path]
    planned: Callable[[dict[str, Graph]], list[Picture]]
    sheet: Callable[[dict[str, Image.Image], dict[str, Graph]], Image.Image]


def read_workflow(name: str) -> Json:
    """A shipped workflow file, by its stem."""
    return json.loads((WORKFLOWS / f"{name}.json").read_text())


def api_graph(workflow: Json, schemas: Json) -> Graph:
    """The graph that the page would queue: each input is a link [node id, output slot] or a widget's value.

    Args:
        workflow: a workflow file's content.
        schemas: the host's /object_info, which tells a widget's value from the page's own companions of it.
    """
    sources = {number: [str(source), slot] for number, source, slot, *_ in workflow["links"]}
    graph = {}
    for entry in workflow["nodes"]:
        if entry["type"] in NOT_RUN:
            continue
        declared = schemas[entry["type"]]["input"]
        widgets = _widget_values(entry, {**declared.get("required", {}), **declared.get("optional", {})})
        links = {slot["name"]: sources[slot["link"]] for slot in entry["inputs"] if slot.get("link") is not None}
        graph[str(entry["id"])] = node(entry["type"], **{**widgets, **links})
    return graph


def _widget_values(entry: Json, declared: dict[str, list]) -> Json:
    """Widget values by input name. A seed and an upload are each followed by a value that only the page reads."""
    values: Iterator[Any] = iter(entry["widgets_values"])
    named = {}
    for slot in entry["inputs"]:
        if "widget" not in slot:
            continue
        named[slot["name"]] = next(values)
        _, options = [*declared[slot["name"]], {}][:2]
        if options.get("control_after_generate") or options.get("image_upload"):
            next(values)
    return named


def with_inputs(graph: Graph, changes: dict[str, Json]) -> Graph:
    """The graph with other inputs on every node of a kind: {class type: {input: value}}."""
    return {
        name: {**entry, "inputs": {**entry["inputs"], **changes.get(entry["class_type"], {})}}
        for name, entry in graph.items()
    }


def renamed(graph: Any, names: dict[str, str]) -> Any:
    """A copy of a workflow or graph with file names, or other whole texts, replaced."""
    if isinstance(graph, dict):
        return {key: renamed(value, names) for key, value in graph.items()}
    if isinstance(graph, list):
        return [renamed(value, names) for value in graph]
    return names.get(graph, graph) if isinstance(graph, str) else graph


def saving(graph: Graph, prefix: str) -> Graph:
    """The graph of several pictures that makes only the one which it saves under a prefix."""
    return {
        name: entry
        for name, entry in graph.items()
        if entry["class_type"] != "SaveImage" or entry["inputs"]["filename_prefix"] == prefix
    }


def without_adapter(graph: Graph) -> Graph:
    """The same graph without our nodes: what read an adapted MODEL reads the one before it, and CLIP Text Encode
    takes the place of what our nodes made of the prompts."""
    before = {name: entry["inputs"]["model"] for name, entry in graph.items() if entry["class_type"] == f"{OURS}Apply"}

    encoders = {}

    def bypassed(value: Any) -> Any:
        while isinstance(value, list) and value[0] in before:
            value = before[value[0]]
        if not isinstance(value, list) or graph[value[0]]["class_type"] != f"{OURS}Encode":
            return value
        name, slot = value
        given = graph[name]["inputs"]
        text = given[("instruction", "prompt", "negative_prompt")[slot]]
        encoders[f"{name}_{slot}"] = node("CLIPTextEncode", clip=given.get("prompt_clip", given["clip"]), text=text)
        return [f"{name}_{slot}", 0]

    plain = {
        name: {**entry, "inputs": {key: bypassed(value) for key, value in entry["inputs"].items()}}
        for name, entry in graph.items()
        if not entry["class_type"].startswith(OURS)
    }
    return plain | encoders


def text_of(graph: Graph) -> str:
    """The prompt: the text that the samplers' positive input comes from."""
    sampler, *_ = (entry for entry in graph.values() if entry["class_type"] == "KSampler")
    value: Any = sampler["inputs"]["positive"]
    for name in ("positive", "prompt", "text", "value"):
        while isinstance(value, list) and name in graph[value[0]]["inputs"]:
            value = graph[value[0]]["inputs"][name]
    return str(value)
