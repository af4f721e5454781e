"""What every part of the card's benchmark shares: its options, its lines, and how much it measures."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from ..report import Lines


@dataclass(frozen=True)
class Part:
    """``small`` models, on a card or on this processor, and where results go."""

    lines: Lines
    small: bool

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def on_card(self) -> bool:
        return self.device == "cuda"


def from_command_line(description: str | None) -> Part:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, required=True, help="the file that `python -m benchmarks.card` began")
    parser.add_argument("--small", action="store_true")
    chosen = parser.parse_args()
    return Part(Lines(chosen.json), chosen.small)
