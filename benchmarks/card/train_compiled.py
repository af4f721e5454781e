"""Training with torch.compile for the base's UNet, beside a step without."""

from __future__ import annotations

import tempfile
import time
from functools import partial

import torch

from ..report import Result
from ..training_parts import matrix_rate
from .fast import NAMES
from .part import from_command_line
from .train_fast import Measure, encoded, settings_of


def main() -> None:
    part = from_command_line(__doc__)
    if part.small:  # without the minutes that compiling takes on a processor
        torch.compile = partial(torch.compile, backend="aot_eager")
    rate = matrix_rate(part.device, "no" if part.small else "bf16")
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(part, "sd15", folder)
        measure = Measure(part, f"{NAMES['sd15']}, compiled", settings, encoded(part, "sd15", settings), rate)
        micro = 4 if part.small else 32
        measure(micro, {})
        begun = time.perf_counter()
        measure(micro, {"compile": True})
        part.lines.add(
            Result(f"{NAMES['sd15']}, compiled: the first step and five more", time.perf_counter() - begun, "s")
        )


if __name__ == "__main__":
    main()
