"""The real host in the test's own process, before any test module imports `comfy`."""

import inside

inside.start()
