"""Where the page draws the nodes and groups of a graph, in either of its designs."""

from __future__ import annotations

import itertools

import pytest
from tools.host.page import FIT_VIEW, ComfyPage
from tools.workflows.shipped import WORKFLOWS

FILES = sorted(WORKFLOWS.glob("*.json"))
each_workflow = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
RIM = 14
# The names of the nodes behind which wires run, each with the wire's ends. Of the page's own paths, drawn alone; a
# node's rim does not count, since that is where slots lie.
WIRES_BEHIND_NODES = """([rim, last]) => {
    const graph = app.canvas.graph, scale = 0.5;
    const all = [...graph.links.values()].filter(link => link.id <= last);
    const boxes = graph.nodes.map(node => [node, ...node.boundingRect]);
    const left = Math.min(...boxes.map(b => b[1])) - 300, top = Math.min(...boxes.map(b => b[2])) - 300;
    const ink = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
    ink.canvas.width = scale * (Math.max(...boxes.map(b => b[1] + b[3])) + 300 - left);
    ink.canvas.height = scale * (Math.max(...boxes.map(b => b[2] + b[4])) + 300 - top);
    const draw = paths => {
        ink.setTransform(1, 0, 0, 1, 0, 0);
        ink.clearRect(0, 0, ink.canvas.width, ink.canvas.height);
        ink.setTransform(scale, 0, 0, scale, -scale * left, -scale * top);
        ink.lineWidth = 3;
        for (const path of paths) ink.stroke(path);
    };
    const hit = ([, x, y, width, height]) => ink.getImageData(
        scale * (x + rim - left), scale * (y + rim - top), scale * (width - 2 * rim), scale * (height - 2 * rim)
    ).data.some((value, i) => i % 4 === 3 && value > 0);
    const wires = all.map(link => {
        const paths = [link.path];
        for (let r = graph.reroutes.get(link.parentId); r; r = graph.reroutes.get(r.parentId)) paths.push(r.path);
        return [link, paths];
    });
    if (wires.some(([, paths]) => paths.some(path => !path))) throw new Error('a wire has not been drawn');
    draw(wires.flatMap(([, paths]) => paths));
    const suspects = boxes.filter(hit);
    return wires.flatMap(([link, paths]) => {
        draw(paths);
        const [from, to] = [link.origin_id, link.target_id].map(id => graph.getNodeById(id)?.title);
        return suspects.filter(hit).map(([node]) => [node.title, `${from} -> ${to} (${link.type})`]);
    });
}"""


def assert_is_readable(page: ComfyPage, last_link: int = 10_000) -> None:
    """Of the open graph: nothing overlaps, every node lies in a group, and no wire runs behind a node.

    Args:
        last_link: the number of the last that counts.
    """
    _assert_nothing_overlaps(page)
    page.page.evaluate(FIT_VIEW, 200)  # what is out of sight is not drawn
    page.page.wait_for_timeout(300)
    hidden = page.page.evaluate(WIRES_BEHIND_NODES, [RIM, last_link])
    assert hidden == [], f"wires run behind nodes: {hidden}"


def _assert_nothing_overlaps(page: ComfyPage) -> None:
    """Of the open graph: no node covers another, no group another, and no node sticks out of its group."""
    boxes = page.page.evaluate("() => app.canvas.graph.nodes.map(n => [n.type, ...n.boundingRect])")
    groups = page.page.evaluate("() => app.canvas.graph.groups.map(g => [...g._bounding])")
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
