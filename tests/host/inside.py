"""The real host inside the test's own process, for what a graph over HTTP cannot show: its model classes,
samplers, clones and memory. Import it before anything of `comfy`."""

import gc
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch
from tools.setup.torchvision_cpu import ensure_torchvision_imports

ROOT = Path(__file__).resolve().parents[2]
HOST = Path(os.environ.get("COMFYUI_DIR", ROOT / ".host" / "ComfyUI"))
PACK = "ipadapter_instruct_pack"


def start() -> Any:
    """Put the host on the path (on the CPU where torch has no CUDA) and load our pack as the host would."""
    if PACK in sys.modules:
        return sys.modules[PACK]
    ensure_torchvision_imports()
    sys.path.insert(0, str(HOST))
    import comfy.options
    import utils.extra_config  # noqa: F401 (as its main.py does: its nodes.py hides this package behind comfy/utils.py)

    comfy.options.args_parsing = False
    import comfy.cli_args

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = pack
    spec.loader.exec_module(pack)
    importlib.import_module(f"{PACK}.nodes")
    gc.freeze()  # the host collects garbage often, and millions of objects of what was imported are none
    return pack
