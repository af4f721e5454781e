"""Runs pytest in this interpreter: `python tools/run_tests.py [pytest's own options]`.

With `make test COMFYUI_PYTHON=…` that is another ComfyUI's interpreter, so that the tests in process meet the packages
of that host; what it lacks for testing (pytest, playwright …) comes from the checkout's `.venv`, after its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# This folder's modules are imported as a package, never by their bare names.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path += [str(path) for path in (HERE.parent / ".venv" / "lib").glob("python*/site-packages")]

import pytest  # noqa: E402

sys.exit(pytest.main(sys.argv[1:]))
