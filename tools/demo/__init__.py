"""`make demo`: the shipped workflows in a real ComfyUI, on one contact sheet."""
