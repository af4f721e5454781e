"""Runs pytest in this interpreter: `python tools/setup/run_tests.py [pytest's own options]`.

With `make test HOST=…` it runs in the environment that `tools.setup.install` made for that ComfyUI. With COMFYUI_DIR
and `make test COMFYUI_PYTHON=…` it is another ComfyUI's own interpreter, so that the tests in process meet the packages
of that host; what it lacks for testing (pytest, playwright …) comes from the checkout's `.venv`, after its own.

Files of tests run side by side, one a core (four at most: each has its own ComfyUI), as two small networks on a core
each are done sooner than one on both. `-n 0` runs them in turn, as does a debugger (`--pdb`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# This folder's modules are imported as a package, never by their bare names.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
if os.environ.get("HOST"):
    sys.path.insert(0, str(ROOT))
    from tools.setup.install import place_of

    place = place_of(os.environ.pop("HOST"))
    os.environ |= {"COMFYUI_DIR": str(place.host), "COMFYUI_PYTHON": str(place.python)}
    os.execv(place.python, [str(place.python), __file__, *sys.argv[1:]])
sys.path += [str(path) for path in (ROOT / ".venv" / "lib").glob("python*/site-packages")]

import pytest  # noqa: E402

workers = min(os.cpu_count() or 1, 4)
os.environ.setdefault("OMP_NUM_THREADS", str((os.cpu_count() or 1) // workers))
# In their own order, which begins with the longest file; the plugin's begins with the one of most tests.
sys.exit(pytest.main(["-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder", *sys.argv[1:]]))
