"""A real ComfyUI, started for the length of a `with` block, with this pack among its custom nodes.

`COMFYUI_DIR` (and `COMFYUI_PYTHON` for its interpreter) choose another ComfyUI than the unpacked one.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tools.setup.install import HOST, ROOT

PACK_NAME = "ipadapter-instruct"
LAUNCHER = Path(__file__).with_name("run_comfyui.py")
START_TIMEOUT_S = 180
POLL_S = 0.05
# No dialog for a new user, no warning about the page's own age, and nothing drawn over the graph.
PAGE_SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.VersionCompatibility.DisableWarnings": True,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.NodeSearchBoxImpl.FollowCursor": False,  # a found node lands where the search box was opened
}
Graph = dict[str, Any]


class ComfyError(RuntimeError):
    """The server refused a graph, or a node failed; the text holds the node's own message."""


class ComfyServer:
    """Starts ComfyUI on a free loopback port in a fresh base directory; everything goes when the block ends.

    Args:
        models: a ComfyUI `models` folder to use instead of the fresh, empty one.
        pack: whether our pack is installed (False gives the bare host).
        options: more command-line options for ComfyUI.
        keep: keep the base directory (log, outputs) for a look afterwards.
    """

    def __init__(
        self, models: Path | None = None, pack: bool = True, options: list[str] | None = None, keep: Path | None = None
    ):
        self.base = Path(keep or tempfile.mkdtemp(prefix="comfyui-"))
        self._remove_base = keep is None
        self._options = options or []
        self.log_file = self.base / "comfyui.log"
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._prepare_folders(models, pack)

    @property
    def models(self) -> Path:
        return self.base / "models"

    @property
    def output(self) -> Path:
        return self.base / "output"

    def _prepare_folders(self, models: Path | None, pack: bool) -> None:
        for name in ("input", "output", "custom_nodes", "user/default"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        if not self.models.exists():
            self.models.symlink_to(models.resolve()) if models else self.models.mkdir()
        link = self.base / "custom_nodes" / PACK_NAME
        if pack and not link.exists():
            link.symlink_to(ROOT, target_is_directory=True)
        (self.base / "user/default/comfy.settings.json").write_text(json.dumps(PAGE_SETTINGS))

    def _command(self) -> list[str]:
        host = Path(os.environ.get("COMFYUI_DIR") or HOST)
        if not (host / "main.py").is_file():
            raise SystemExit(
                f"There is no ComfyUI in {host}: run `make setup`, or set COMFYUI_DIR to a folder with a main.py."
            )
        python = os.environ.get("COMFYUI_PYTHON") or sys.executable
        no_graphics_card = "import sys, torch; sys.exit(torch.cuda.is_available())"
        cpu = ["--cpu"] if subprocess.run([python, "-c", no_graphics_card]).returncode == 0 else []
        database = f"sqlite:///{self.base}/user/comfyui.db"
        return [
            python, "-u", str(LAUNCHER), str(host), *cpu,
            "--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(self.base),
            "--database-url", database, "--disable-auto-launch", "--disable-api-nodes", *self._options,
        ]  # fmt: skip

    def __enter__(self) -> ComfyServer:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        with self.log_file.open("wb") as log:
            # A session of its own, so that one signal ends it together with anything it started.
            self._process = subprocess.Popen(
                self._command(),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.base,
                start_new_session=True,
            )
        try:
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_until_up(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ComfyError(f"ComfyUI ended while starting:\n{self.log_text()[-4000:]}")
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(POLL_S)
        raise ComfyError(f"ComfyUI was not up after {START_TIMEOUT_S} s:\n{self.log_text()[-4000:]}")

    def stop(self) -> None:
        """End the server's process group and remove its base directory."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._process = None
        if self._remove_base:
            shutil.rmtree(self.base, ignore_errors=True)

    def log_text(self) -> str:
        """Everything the server wrote so far."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def object_info(self) -> dict[str, Any]:
        """Every node's schema, as the page sees it."""
        return self.get("/object_info")

    def upload(self, path: Path) -> str:
        """Put a picture where LoadImage finds it; returns the name to give to LoadImage."""
        shutil.copyfile(path, self.base / "input" / path.name)
        return path.name

    def queue(self, graph: Graph) -> str:
        """Queue an API-format graph; returns its prompt id. Raises ComfyError when its validation fails."""
        try:
            return json.loads(self.post("/prompt", {"prompt": graph, "client_id": "tests"}))["prompt_id"]
        except urllib.error.HTTPError as error:
            raise ComfyError(f"The graph was refused: {error.read().decode(errors='replace')}") from None

    def wait(self, prompt_id: str, timeout: float = 300) -> dict[str, Any]:
        """The finished prompt's history entry. Raises ComfyError with the failing node's message."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                _raise_node_errors(entry)
                return entry
            if self._process is None or self._process.poll() is not None:
                raise ComfyError(f"ComfyUI ended while running a graph:\n{self.log_text()[-4000:]}")
            time.sleep(POLL_S)
        raise ComfyError(f"No result after {timeout} s:\n{self.log_text()[-4000:]}")

    def run(self, graph: Graph, timeout: float = 300) -> list[np.ndarray]:
        """Queue, wait, and return the pictures it saved or previewed: float [H, W, C] in 0–1, in node order."""
        return self.pictures(self.wait(self.queue(graph), timeout))

    def pictures(self, entry: dict[str, Any]) -> list[np.ndarray]:
        """The pictures of a history entry, sorted by node id."""
        outputs = sorted(entry["outputs"].items(), key=lambda item: (len(item[0]), item[0]))
        return [self._picture(image) for _, output in outputs for image in output.get("images", [])]

    def _picture(self, image: dict[str, str]) -> np.ndarray:
        query = urllib.parse.urlencode({key: image[key] for key in ("filename", "subfolder", "type")})
        with urllib.request.urlopen(f"{self.url}/view?{query}", timeout=60) as answer:
            return np.asarray(Image.open(io.BytesIO(answer.read())), dtype=np.float32) / 255


def _raise_node_errors(entry: dict[str, Any]) -> None:
    for kind, details in entry.get("status", {}).get("messages", []):
        if kind == "execution_error":
            raise ComfyError(
                f"{details['node_type']} (node {details['node_id']}) failed: "
                f"{details['exception_type']}: {details['exception_message']}\n{''.join(details['traceback'])}"
            )
        if kind == "execution_interrupted":
            raise ComfyError(f"The prompt was interrupted: {details}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
