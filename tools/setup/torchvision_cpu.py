"""Makes `import torchvision` work beside a CPU-only torch.

torchvision's build from the package registry expects a torch with CUDA: without one its compiled half does not load,
and its import then fails because `torchvision::nms` is unknown. ComfyUI, open_clip and transformers import torchvision
for a few image helpers in plain Python, so declaring the two operators (without an implementation) is enough.

`tools.setup.install` puts this file into the virtual environment, where it runs at Python's start; it costs nothing
until torchvision is imported.
"""

from __future__ import annotations

import importlib.abc
import sys

NMS_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept_alive: list[object] = []  # the operators vanish with the Library object that declared them


class DeclaresOperators(importlib.abc.MetaPathFinder):
    """Finds no module: it steps in before the one of torchvision's that needs the operators is imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision._meta_registrations" and not _kept_alive:
            import torchvision.extension

            if not torchvision.extension._has_ops():
                _declare_operators()


def ensure_torchvision_imports() -> None:
    """From here on torchvision's import declares the operators that its compiled half would have brought."""
    if not any(type(finder).__name__ == DeclaresOperators.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, DeclaresOperators())


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + NMS_SCHEMA)
    _kept_alive.append(library)
