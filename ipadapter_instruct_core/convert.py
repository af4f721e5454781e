"""``python -m ipadapter_instruct_core.convert IN OUT``: .bin to .safetensors and back, losing nothing."""

import argparse
import logging
import sys
from pathlib import Path

from . import checkpoint
from .config import AdapterConfig

log = logging.getLogger("ipadapter_instruct")


def convert(source: str, target: str) -> None:
    """Rewrite an adapter file; every tensor keeps its bits, precision and key, and metadata is kept or made."""
    checkpoint.check_target(Path(target))
    config: AdapterConfig = checkpoint.load(source).config
    state, metadata = checkpoint.read(source)
    checkpoint.write(target, state, metadata or checkpoint.describe(config))
    log.info("%s: %d tensors, %s", target, len(state), config.base.label)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ipadapter_instruct_core.convert", description=__doc__)
    parser.add_argument("source", metavar="IN", help="an adapter file, .bin or .safetensors")
    parser.add_argument("target", metavar="OUT", help="the file to write; its suffix decides on the layout")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        convert(arguments.source, arguments.target)
    except (ValueError, OSError) as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
