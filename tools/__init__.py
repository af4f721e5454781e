"""The project's own tools: set-up, a real ComfyUI to test on, tiny models for it, a browser to drive its page."""
