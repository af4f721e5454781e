"""Where the page draws the nodes and groups of a graph, in either of its designs."""

from __future__ import annotations

import itertools

import pytest
from tools.host.page import ComfyPage
from tools.workflows.shipped import WORKFLOWS

FILES = sorted(WORKFLOWS.glob("*.json"))
each_workflow = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def assert_nothing_overlaps(page: ComfyPage) -> None:
    """No node covers another, no group another, and no node sticks out of its group."""
    boxes = page.page.evaluate("() => app.graph.nodes.map(n => [n.type, ...n.boundingRect])")
    groups = page.page.evaluate("() => app.graph.groups.map(g => [...g._bounding])")
    for (first, *a), (second, *b) in itertools.combinations(boxes, 2):
        assert not _overlap(a, b), f"{first} at {a} and {second} at {b} overlap"
    for a, b in itertools.combinations(groups, 2):
        assert not _overlap(a, b), f"groups at {a} and {b} overlap"
    for kind, x, y, width, height in boxes:
        assert any(
            gx <= x and gy <= y and x + width <= gx + gw and y + height <= gy + gh for gx, gy, gw, gh in groups
        ), f"{kind} at {x, y, width, height} sticks out of its group"


def _overlap(a: list[float], b: list[float]) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]
