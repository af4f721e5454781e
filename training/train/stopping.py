"""One run a folder, and its end when somebody asks for it."""

import errno
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

log = logging.getLogger("ipadapter_instruct")

LOCK = ".lock"
# What file systems say that know no locks: Lustre mounted without flock, NFS without its lock daemon.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold a run's folder for this process; where the file system knows no locks, without.

    Raises:
        ValueError: another run holds it.
    """
    # A soft lock is a file, which outlives a killed run and keeps out every other.
    lock = FileLock(out / LOCK, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"Another run is writing into {out}; wait until it has ended, stop it, or give another --out."
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
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
