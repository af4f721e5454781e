"""A real ComfyUI to test on: its server, its page in a browser, and graphs for it."""
