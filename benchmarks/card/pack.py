"""Everything that the card's benchmark needs, as one archive: `python -m benchmarks.card.pack card.tar.gz`.

For a machine with a card and PyTorch, and without a network: the checkout without pictures and shipped weights, the
host's source without its page and the word lists of its large text encoders, and wheels of what such a machine lacks.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOST = Path(os.environ.get("COMFYUI_DIR", ROOT / ".host" / "ComfyUI"))
MOST = 60 * 2**20  # bytes
# Beyond torch, torchvision, transformers, accelerate, safetensors, numpy, pillow and the like.
PACKAGES = (
    "diffusers", "importlib_metadata", "zipp", "open_clip_torch", "ftfy", "wcwidth",
    "pydantic", "pydantic_core", "annotated_types", "typing_inspection", "tyro", "docstring_parser", "typeguard",
    "tenacity", "einops", "torchsde", "trampoline", "av",
)  # fmt: skip
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")
OURS = (
    "__init__.py",
    "benchmarks",
    "ipadapter_instruct_core",
    "nodes",
    "tests",
    "tools",
    "training",
    "workflows/inputs",
)
LEFT_OUT = ("training/miniature/weights/", "training/miniature/figures")
HOST_PARTS = (
    "comfy",
    "comfy_api",
    "comfy_api_nodes",
    "comfy_config",
    "comfy_execution",
    "comfy_extras",
    "app",
    "utils",
)
LARGE_WORDS = 300_000  # bytes: a word list of another text encoder than CLIP's


def wheels(folder: Path, python: str) -> None:
    """Download the wheels of the versions that are installed here."""
    named = [f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES]
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    kind = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, *kind, *named]
    subprocess.run(command, check=True)


def ours() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *OURS],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / name for name in listed.stdout.splitlines() if not name.startswith(LEFT_OUT)]


def of_the_host() -> list[Path]:
    files = [path for part in HOST_PARTS for path in sorted((HOST / part).rglob("*")) if path.is_file()]
    files += sorted(HOST.glob("*.py"))
    small = [path for path in files if path.suffix == ".py" or path.stat().st_size < LARGE_WORDS or "sd1" in str(path)]
    return [path for path in small if "__pycache__" not in path.parts]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.card.pack", description=__doc__)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--python", default="3.12", help="of the machine with the card")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tarfile.open(chosen.archive, "w:gz") as archive:
        wheels(Path(folder), chosen.python)
        for wheel in sorted(Path(folder).iterdir()):
            archive.add(wheel, f"wheels/{wheel.name}")
        for path in ours():
            archive.add(path, path.relative_to(ROOT))
        for path in of_the_host():
            archive.add(path, Path(".host/ComfyUI") / path.relative_to(HOST))
    size = chosen.archive.stat().st_size
    print(f"{chosen.archive}: {size / 2**20:.1f} MiB")
    if size > MOST:
        raise SystemExit(f"That is more than {MOST / 2**20:.0f} MiB; leave something out.")


if __name__ == "__main__":
    main()
