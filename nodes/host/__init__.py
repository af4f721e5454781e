"""The one place that knows ComfyUI's internals.

folders   where adapter files lie                memory    weights under the host's memory manager
vision    pictures -> image tokens               text      wordings -> instruction tokens
sites     the attentions that an adapter adds to  slots     what sits there while sampling
sampling  what happens while a picture is sampled
apply     an application of an adapter -> a patched clone of a MODEL
"""

import logging

log = logging.getLogger("ipadapter_instruct")
