"""The shipped workflows in the page's newer design (Nodes 2.0), which draws nodes as elements of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from layout import FILES, assert_is_readable, each_workflow
from tools.host.page import ComfyPage
from tools.host.server import ComfyServer
from tools.tiny.models import with_tiny_names
from tools.workflows.hint_pictures import INPUTS

NEW_DESIGN = "Comfy.VueNodes.Enabled"
# Earlier pages have it as an experiment: 1.32 moves nodes off their places.
PAGE_WITH_NEW_DESIGN = (1, 42)
LEGIBLE = 4.5  # contrast of text, WCAG 2.2, 1.4.3
# The colours [R, G, B] in 0-255 of each text of a note and of what lies under it, all its ancestors' grounds blended.
NOTE_COLOURS = """() => {
    const ink = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const laid = colour => {
        ink.fillStyle = colour;
        ink.fillRect(0, 0, 1, 1);
        return [...ink.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const notes = app.graph.nodes.filter(node => node.type === 'MarkdownNote').map(node => node.id);
    const elements = notes.flatMap(id => [...document.querySelectorAll(`[data-node-id="${id}"] *`)]);
    const hasText = element => [...element.childNodes].some(n => n.nodeType === Node.TEXT_NODE && n.data.trim());
    return elements.filter(hasText).map(element => {
        const grounds = [];
        for (let e = element; e; e = e.parentElement) grounds.unshift(getComputedStyle(e).backgroundColor);
        const ground = ['black', ...grounds].map(laid).at(-1);
        return [element.textContent.trim(), laid(getComputedStyle(element).color), ground];
    });
}"""


@pytest.fixture
def new_page(page: ComfyPage, server: ComfyServer) -> Iterator[ComfyPage]:
    version = page.page.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__ ?? '0.0'")
    if tuple(int(number) for number in version.split(".")[:2]) < PAGE_WITH_NEW_DESIGN:
        pytest.skip(f"the page {version} has the new design as an experiment")
    for picture in INPUTS.glob("*.png"):
        server.upload(picture)
    page.set_option(NEW_DESIGN, True)
    yield page
    page.set_option(NEW_DESIGN, False)


def opened(page: ComfyPage, file: Path) -> ComfyPage:
    page.load(with_tiny_names(json.loads(file.read_text())))
    page.page.wait_for_function(
        "() => document.querySelectorAll('[data-node-id]').length === app.graph.nodes.length", timeout=20_000
    )
    page.page.wait_for_timeout(500)  # the page measures its elements after it has drawn them
    return page


@each_workflow
def test_nothing_overlaps_and_no_wire_runs_behind_a_node(new_page: ComfyPage, file: Path) -> None:
    assert_is_readable(opened(new_page, file))
    assert new_page.errors == []


@each_workflow
def test_the_notes_can_be_read(new_page: ComfyPage, file: Path) -> None:
    texts = opened(new_page, file).page.evaluate(NOTE_COLOURS)
    assert len(texts) > 10
    for text, colour, ground in texts:
        assert contrast(colour, ground) >= LEGIBLE, f"{text!r} is {colour} on {ground}"


def contrast(*colours: list[int]) -> float:
    """WCAG 2.2's ratio of two colours [R, G, B] in 0-255: 1 for equal ones, 21 for black and white."""

    def luminance(colour: list[int]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted(map(luminance, colours))
    return (lighter + 0.05) / (darker + 0.05)


def test_each_box_says_what_it_is_for(new_page: ComfyPage) -> None:
    """This design shows a box's name and no placeholder."""
    (file,) = (file for file in FILES if file.stem == "object")
    page = opened(new_page, file)
    node = page.page.evaluate("() => app.graph.nodes.find(n => n.type === 'IPAdapterInstructEncode').id")
    shown = page.page.locator(f"[data-node-id='{node}']").inner_text()
    for name in ("own wording (optional)", "subject (object task)", "positive prompt", "negative prompt"):
        assert name in shown


def test_the_scales_are_shown_where_three_way_is_chosen(new_page: ComfyPage) -> None:
    """On the node where it is chosen, and not on another."""
    (file,) = (file for file in FILES if file.stem == "sd3_style_and_composition_with_canny_controlnet")
    page = opened(new_page, file)
    kinds = "() => app.graph.nodes.filter(n => n.type === 'IPAdapterInstructApply').map(n => n.id)"
    first, second = page.page.evaluate(kinds)
    assert [scales(page, node) for node in (first, second)] == [False, False]
    page.set_widget(first, "guidance", "three-way")
    page.page.wait_for_timeout(500)
    assert [scales(page, node) for node in (first, second)] == [True, False]


def scales(page: ComfyPage, node: int) -> bool:
    shown = page.page.locator(f"[data-node-id='{node}']").inner_text()
    both = [name in shown for name in ("instruct_scale", "image_scale")]
    assert both[0] == both[1]
    return both[0]
