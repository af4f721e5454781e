"""Makes `import torchvision` work beside a CPU-only torch.

torchvision's build from the package registry expects a torch with CUDA: without one its compiled half does not load,
and its import then fails because `torchvision::nms` is unknown. ComfyUI and open_clip import torchvision for a few
image helpers in plain Python, so declaring the two operators (without an implementation) is enough.
"""

from __future__ import annotations

import sys

NMS_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept_alive: list[object] = []  # the operators vanish with the Library object that declared them


def ensure_torchvision_imports() -> None:
    """Import torchvision; where that fails for want of `nms`, declare the operators and import it again."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _declare_operators()
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torchvision  # noqa: F401


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + NMS_SCHEMA)
    _kept_alive.append(library)
