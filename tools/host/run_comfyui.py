"""Starts a ComfyUI's main.py in this interpreter: `python run_comfyui.py COMFYUI_DIR [ComfyUI's own options]`.

Only a CPU-only torch needs the detour, for torchvision's sake. Elsewhere torch stays unimported until ComfyUI itself
imports it, since ComfyUI sets up its memory allocator before that.
"""

from __future__ import annotations

import runpy
import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TORCHVISION_HOOK = ROOT / "tools" / "setup"


def main() -> None:
    host = Path(sys.argv[1]).resolve()
    # Neither this folder nor the checkout may stay importable: ComfyUI has top-level modules `nodes` and `utils`.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (HERE, ROOT)]
    if metadata.version("torch").endswith("+cpu"):
        sys.path.insert(0, str(TORCHVISION_HOOK))
        from torchvision_cpu import ensure_torchvision_imports

        sys.path.remove(str(TORCHVISION_HOOK))
        ensure_torchvision_imports()
    sys.path.insert(0, str(host))
    script = str(host / "main.py")
    sys.argv = [script, *sys.argv[2:]]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
