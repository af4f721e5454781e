"""The project's own tools: set-up, a real ComfyUI to test on, tiny models to feed it, and a browser to drive its page."""
