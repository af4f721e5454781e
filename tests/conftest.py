"""Fixtures for every test: the checkout's packages, tiny models, and one running ComfyUI.

The repository's root must not be importable, since our `nodes/` would then hide the host's `nodes.py`. So it is taken
off the path, and the packages that tests need are loaded by their place instead.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Before torch is loaded. Its oneDNN heeds not ATEN_CPU_CAPABILITY but this: on a newer processor the two would choose
# kernels that do not fit each other, and attention in bf16 fails.
if os.environ.get("ATEN_CPU_CAPABILITY") in ("default", "avx2"):
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")


def _load_package(name: str) -> None:
    folder = ROOT / name
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
for package in ("tools", "ipadapter_instruct_core", "training"):
    _load_package(package)

from tools.host.server import ComfyServer  # noqa: E402
from tools.setup.torchvision_cpu import ensure_torchvision_imports  # noqa: E402
from tools.tiny.models import make_tiny_models  # noqa: E402

ensure_torchvision_imports()


# So that a test run that is ended takes its server with it: fixtures are torn down as after Ctrl-C.
signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ComfyUI models folder full of tiny models."""
    return make_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def server(tiny_models: Path) -> Iterator[ComfyServer]:
    """One real ComfyUI with our pack and the tiny models, for all tests of a run."""
    with ComfyServer(models=tiny_models) as running:
        yield running


@pytest.fixture(scope="session")
def reference_picture(server: ComfyServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A picture with large coloured areas in the server's input folder; its name for LoadImage."""
    import numpy as np
    from PIL import Image

    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("pictures") / "reference.png"
    Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC).save(path)
    return server.upload(path)
