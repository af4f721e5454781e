"""ComfyUI's own page in headless Chromium: load a workflow file, add and wire nodes, run, and take its picture."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Locator, Page, Response, TimeoutError, sync_playwright
from tools.setup.system_packages import ensure_chromium

from .server import ComfyServer

Workflow = dict[str, Any]

BROWSER_OPTIONS = [
    "--headless",
    "--no-sandbox",  # root has none
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# A fresh browser gets ComfyUI's default graph last of all; what is done before that would be overwritten.
PAGE_READY = "() => window.app?.graph?.nodes.length && document.querySelector('[data-testid=queue-button]')"
# The button is marked in newer pages, a box around it in older ones.
RUN_BUTTON = "button[data-testid=queue-button], [data-testid=queue-button] button"
# Frames all nodes and groups of the open graph in the view; returns nothing.
FIT_VIEW = """(margin) => {
    const {nodes, groups} = app.canvas.graph;
    const boxes = [...nodes.map(n => n.boundingRect), ...groups.map(g => g._bounding)];
    const left = Math.min(...boxes.map(b => b[0])), top = Math.min(...boxes.map(b => b[1]));
    const right = Math.max(...boxes.map(b => b[0] + b[2])), bottom = Math.max(...boxes.map(b => b[1] + b[3]));
    const view = app.canvas.canvas.getBoundingClientRect();
    const scale = Math.min((view.width - 2 * margin) / (right - left), (view.height - 2 * margin) / (bottom - top), 1);
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset[0] = view.width / 2 / scale - (left + right) / 2;
    app.canvas.ds.offset[1] = view.height / 2 / scale - (top + bottom) / 2;
    app.canvas.setDirty(true, true);
}"""
# A picture of the graph shows the graph and its text boxes, and nothing that floats above them.
HIDE_MENUS = """
    body * { visibility: hidden !important; }
    canvas.lgraphcanvas, .dom-widget, .dom-widget * { visibility: visible !important; }
"""
# The search box has another look and other marks in each generation of the page.
SEARCH_BOX = ".comfy-vue-node-search-container input, :is([role=search], .p-dialog) input[role=combobox]"
SEARCH_HIT = (
    ".comfy-vue-node-search-container [role=option].p-focus, "
    ":is([role=search], .p-dialog) [role=option][aria-selected=true]"
)
# Where a node that is yet to be placed hangs at the mouse.
GHOST = "id => app.canvas.state?.ghostNodeId === id && app.canvasPosToClientPos(app.graph.getNodeById(id).pos)"
# The page advertises its newer renderer above the graph until a person has seen it.
DISMISS_BANNER = "localStorage.setItem('vueNodesBannerDismissed', 'true')"


class ComfyPage:
    """The page of a running server. Errors that the page itself reports are collected in `errors`."""

    def __init__(self, page: Page, server: ComfyServer):
        self.page = page
        self.server = server
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.add_init_script(DISMISS_BANNER)
        page.goto(server.url)
        page.wait_for_function(PAGE_READY, timeout=60_000)

    def load(self, workflow: Workflow | Path) -> None:
        """Open a workflow as a person does: through the page's file input."""
        content = json.loads(workflow.read_text()) if isinstance(workflow, Path) else workflow
        expected = len(content["nodes"])
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(content, file)
            file.flush()
            self.page.set_input_files("#comfy-file-input", file.name)
            self.page.wait_for_function(f"() => app.graph.nodes.length === {expected}", timeout=20_000)

    def clear(self) -> None:
        """Start from an empty graph, unscaled and unmoved."""
        reset = "app.canvas.ds.scale = 1; app.canvas.ds.offset[0] = app.canvas.ds.offset[1] = 0"
        self.page.evaluate(f"() => {{ app.graph.clear(); {reset}; app.canvas.setDirty(true, true); }}")

    def set_option(self, name: str, value: Any) -> None:
        """Set one of the page's own settings, as its dialog does; it holds for all later pages of this server."""
        self.page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])

    def workflow(self) -> Workflow:
        """The graph as the page would save it."""
        return self.page.evaluate("() => app.graph.serialize()")

    def run(self, timeout: float = 120) -> list[np.ndarray]:
        """Press Run, wait until the page shows every picture, and return them: float [H, W, C] in 0–1."""
        with self.page.expect_response(_is_queued) as answer:
            self.page.locator(RUN_BUTTON).first.click()
        reply = answer.value
        assert reply.ok, f"The page's graph was refused: {reply.text()}"
        entry = self.server.wait(reply.json()["prompt_id"], timeout)
        with_pictures = [key for key, output in entry["outputs"].items() if output.get("images")]
        shown = "ids => ids.every(id => app.nodeOutputs[id]?.images?.length)"
        self.page.wait_for_function(shown, arg=with_pictures, timeout=20_000)
        return self.server.pictures(entry)

    def add_node(self, search: str, x: float, y: float) -> int:
        """Double-click an empty spot, type into the search box, press Enter; returns the new node's id.

        Args:
            search: what a person types; the first hit is taken.
            x, y: where the node goes, in page pixels.
        """
        before = self.page.evaluate("() => app.graph.nodes.map(n => n.id)")
        box = self._open_search_box(x, y)
        box.fill(search)
        self.page.locator(SEARCH_HIT).wait_for()
        box.press("Enter")
        self.page.wait_for_function(f"() => app.graph.nodes.length === {len(before) + 1}", timeout=10_000)
        box.wait_for(state="detached")  # the closing dialog would catch the next click
        node = self.page.evaluate("ids => app.graph.nodes.find(n => !ids.includes(n.id)).id", before)
        at = self.page.evaluate(GHOST, node)
        if at:  # some pages have it follow the mouse until a click
            self.page.mouse.move(2 * x - at[0], 2 * y - at[1])
            self.page.mouse.click(2 * x - at[0], 2 * y - at[1])
        return node

    def place_node(self, kind: str, x: float, y: float) -> int:
        """Add a node without the search box, at a place of the graph; returns its id."""
        script = """([kind, x, y]) => {
            const node = LiteGraph.createNode(kind);
            node.pos = [x, y];
            app.graph.add(node);
            return node.id;
        }"""
        return self.page.evaluate(script, [kind, x, y])

    def _open_search_box(self, x: float, y: float) -> Locator:
        """Double-click; again where a busy page drew a frame between the clicks and so took them for two."""
        box = self.page.locator(SEARCH_BOX)
        for _ in range(5):
            self.page.mouse.move(x, y)
            self.page.mouse.dblclick(x, y)
            try:
                box.wait_for(timeout=2_000)
                return box
            except TimeoutError:
                continue
        raise AssertionError(f"No search box opened at ({x}, {y}): is the spot free?")

    def connect(self, source: int, output: str, target: int, input_name: str) -> None:
        """Drag a link from an output to an input, by their names, with the mouse."""
        place = """([id, name, isInput]) => {
            const node = app.graph.getNodeById(id), slots = isInput ? node.inputs : node.outputs;
            const index = slots.findIndex(slot => slot.name === name);
            if (index < 0) throw new Error(`${node.type} has no ${name}: ${slots.map(slot => slot.name)}`);
            const [x, y] = node.getConnectionPos(isInput, index);
            return app.canvasPosToClientPos([x, y]);
        }"""
        start = self.page.evaluate(place, [source, output, False])
        end = self.page.evaluate(place, [target, input_name, True])
        self.page.mouse.move(*start)
        self.page.mouse.down()
        self.page.mouse.move((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, steps=4)
        self.page.mouse.move(*end, steps=4)
        self.page.mouse.up()
        made = """([id, name, from]) => {
            const node = app.graph.getNodeById(id), slot = node.inputs.find(slot => slot.name === name);
            return slot.link != null && app.graph.links.get(slot.link).origin_id === from;
        }"""
        self.page.wait_for_function(made, arg=[target, input_name, source], timeout=5_000)

    def set_widget(self, node: int, name: str, value: Any) -> None:
        """Set a widget's value through its own setter, callbacks included."""
        script = """([id, name, value]) => {
            const widget = app.graph.getNodeById(id).widgets.find(widget => widget.name === name);
            widget.value = value;
            widget.callback?.(value);
        }"""
        self.page.evaluate(script, [node, name, value])

    def screenshot(self, path: Path) -> Path:
        """The whole page as it is."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path)
        return path

    def graph_picture(self, path: Path, margin: int = 24) -> Path:
        """A picture of the whole graph without the page's menus; the extension chooses PNG or JPEG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.evaluate(FIT_VIEW, margin)
        style = self.page.add_style_tag(content=HIDE_MENUS)
        self.page.wait_for_timeout(400)  # text boxes follow the graph one frame later
        self.page.screenshot(path=path)
        style.evaluate("element => element.remove()")
        return path


def _is_queued(answer: Response) -> bool:
    return answer.url.endswith("/prompt") and answer.request.method == "POST"


@contextmanager
def comfy_page(server: ComfyServer, width: int = 1600, height: int = 900) -> Iterator[ComfyPage]:
    """Open the server's page in a browser of its own; both close with the block."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=ensure_chromium(), args=BROWSER_OPTIONS)
        try:
            context = browser.new_context(viewport={"width": width, "height": height})
            yield ComfyPage(context.new_page(), server)
        finally:
            browser.close()
