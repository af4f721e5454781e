"""Training with torch.compile for the base's UNet, beside a step without."""

from __future__ import annotations

import tempfile
import time

from ..report import Result
from ..training_parts import matrix_rate
from .fast import NAMES
from .part import from_command_line
from .train_fast import LAYOUT, Measure, encoded, settings_of


def main() -> None:
    part = from_command_line(__doc__)
    rate = matrix_rate(part.device, "no" if part.small else "bf16")
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(part, "sd15", folder)
        measure = Measure(part, "sd15", settings, encoded(part, "sd15", settings), rate)
        micro = 4 if part.small else 32
        measure(micro, {})
        for changes in ({"compile": True}, {"compile": True} | LAYOUT)[: 1 if part.small else 2]:
            begun = time.perf_counter()
            measure(micro, changes)
            seconds = time.perf_counter() - begun
            part.lines.add(Result(f"{NAMES['sd15']}: compile, seconds of it and its steps", seconds, "s"))


if __name__ == "__main__":
    main()
