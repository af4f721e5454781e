"""A run's folder is its own, on file systems that know no locks too."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training.train.stopping import LOCK, alone_in

from runs import environment

fcntl = pytest.importorskip("fcntl")


def refuse(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL"])
def test_a_run_goes_on_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    refuse(monkeypatch, getattr(errno, name))
    with alone_in(tmp_path):
        assert f"{tmp_path} cannot be locked; see to it that no other run writes there" in caplog.text


def test_a_killed_run_without_a_lock_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = (
        "import errno, fcntl, os, pathlib, signal\n"
        "def flock(*_): raise OSError(errno.ENOSYS, 'no')\n"
        "fcntl.flock = flock\n"
        "from training.train.stopping import alone_in\n"
        f"with alone_in(pathlib.Path({str(tmp_path)!r})): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script], env=environment(), timeout=120)
    assert not (tmp_path / LOCK).exists() or not (tmp_path / LOCK).read_text()
    refuse(monkeypatch, errno.ENOSYS)
    monkeypatch.setattr("socket.gethostname", lambda: "another")  # from where nobody sees that it was killed
    caplog.set_level(logging.WARNING)
    with alone_in(tmp_path):
        assert "cannot be locked" in caplog.text


def test_other_errors_of_a_lock_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.EIO)
    with pytest.raises(OSError), alone_in(tmp_path):
        pass
