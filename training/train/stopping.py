"""One run a folder, and its end when somebody asks for it."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

log = logging.getLogger("ipadapter_instruct")

LOCK = ".lock"


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold a run's folder for this process; where the file system knows no locks, without.

    Raises:
        ValueError: another run holds it.
    """
    lock = FileLock(out / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"Another run is writing into {out}; wait until it has ended, stop it, or give another --out."
        ) from None
    except NotImplementedError:
        log.warning("train: %s cannot be locked; see to it that no other run writes there", out)
    try:
        yield
    finally:
        lock.release()


class Stop:
    """Whether the run was asked to end, by SIGTERM or by Ctrl-C; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    def _ask(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.asked:
                raise KeyboardInterrupt
            log.info("train: stopping; this step is finished and saved first (Ctrl-C again: not saved)")
        self.asked = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals ask while this is entered; afterwards they do what they did before."""
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for number in before:
                signal.signal(number, self._ask)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
