"""Numbers beside the bare host, measured side by side in one run: `python -m benchmarks`.

counts   operations and read-backs that the adapter adds to a step, exactly
steps    how much longer a step takes
apply    Apply on a re-run, clones, memory, and the pack's import

Each also runs alone, `python -m benchmarks.counts --json FILE`. With `IPADAPTER_PLUS_DIR` set to a checkout of
ComfyUI_IPAdapter_plus, that pack is measured in the same run. `COMFYUI_DIR` chooses another ComfyUI.
"""
