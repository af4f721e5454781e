"""OpenMP's threads wait without spinning wherever the project starts Python, unless somebody asked for other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("asked", "policy"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
@pytest.mark.parametrize("module", ["tools", "training.__main__"])
def test_threads_wait_without_spinning(module: str, asked: str | None, policy: str) -> None:
    kept = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment = {**kept, "OMP_DISPLAY_ENV": "TRUE"} | ({"OMP_WAIT_POLICY": asked} if asked else {})
    command = [sys.executable, "-c", f"import {module}, torch"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"OMP_WAIT_POLICY = '(\w+)'", done.stderr)[:1] == [policy]  # as OpenMP itself tells it
