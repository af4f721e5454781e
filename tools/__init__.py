"""The project's own tools: set-up, a real ComfyUI to test on, tiny models for it, a browser to drive its page."""

import os

# OpenMP's threads spin while they wait, and on cores that others use too they keep each other from working: a pass of a
# small network beside two busy processes took 33.9 ms, and 7.8 ms so (4.4 ms alone). Read once, as torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
