"""Nothing heavy is imported before it is used; who imports whom is held by import-linter (pyproject.toml)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = sorted((ROOT / "ipadapter_instruct_core").rglob("*.py"))


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_prints_nothing(path: Path) -> None:
    calls = [item for item in ast.walk(ast.parse(path.read_text())) if isinstance(item, ast.Call)]
    assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def _modules_after(statement: str) -> set[str]:
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/", timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_core_imports_nothing_heavy() -> None:
    names = ", ".join(f"ipadapter_instruct_core.{path.stem}" for path in CORE if path.stem != "__init__")
    modules = _modules_after(f"import {names}")
    assert "ipadapter_instruct_core.encoders" in modules
    assert not {"open_clip", "torchvision", "huggingface_hub", "transformers"} & modules


def test_importing_the_pack_imports_nothing_at_all() -> None:
    """The host imports every pack at its start; tests import ours without a host."""
    load = (
        "import importlib.util as u; "
        f"s = u.spec_from_file_location('pack', {str(ROOT / '__init__.py')!r}); "
        "m = u.module_from_spec(s); sys.modules['pack'] = m; s.loader.exec_module(m); assert m.comfy_entrypoint"
    )
    modules = _modules_after(load)
    assert "pack" in modules
    assert not {"torch", "numpy", "open_clip", "safetensors", "comfy", "comfy_api"} & modules
