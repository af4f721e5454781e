"""Debian packages that pip cannot bring: a browser, and venv support where the distribution splits it off.

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

BROWSER_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def apt_install(package: str, purpose: str, instead: str) -> None:
    """Install a Debian package, or end the program with one sentence that asks for it.

    Args:
        package: the package's name.
        purpose: what needs it, to complete "... is needed for".
        instead: what a person without root can do.
    """
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SystemExit(f"{package} is needed for {purpose}: please install it ({instead}), then run this again.")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", package]):
        subprocess.run(["apt-get", "-qq", *command], check=True, env=environment, stdout=subprocess.DEVNULL)


def find_chromium() -> str | None:
    """Path of a Chromium-like browser: the one named by CHROMIUM first, then whatever is on the PATH."""
    named = os.environ.get("CHROMIUM")
    if named:
        if not Path(named).is_file():
            raise SystemExit(f"CHROMIUM={named}: there is no such file. Name the browser's executable, or unset it.")
        return named
    return next((path for name in BROWSER_NAMES if (path := shutil.which(name))), None)


def ensure_chromium() -> str:
    """Path of a browser, installed first where there is none."""
    if find_chromium() is None:
        apt_install(
            "chromium",
            "the browser tests",
            "as root: apt-get install chromium; or name a browser with CHROMIUM=/path/to/chromium",
        )
    browser = find_chromium()
    if browser is None:
        raise SystemExit("chromium was installed, but no browser is on the PATH: name it with CHROMIUM=/path/to/it.")
    return browser
