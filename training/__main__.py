"""`python -m training VERB [CONFIG.toml] [--option value ...]`: see `python -m training --help`."""

import logging
import os
import sys

# As in tools/__init__.py: before torch is loaded, which is when OpenMP reads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from training.cli.verbs import USAGE, VERBS, read_config, sentence, unknown_verb  # noqa: E402


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = sys.argv[1:]
    if not arguments:
        sys.exit(USAGE)
    verb = arguments[0]
    if verb in ("-h", "--help"):
        print(USAGE)
        return
    if verb not in VERBS:
        sys.exit(unknown_verb(verb))
    try:
        config, run = read_config(verb, arguments[1:])
        run(config)
    except KeyboardInterrupt:
        sys.exit(f"{verb}: stopped; the same command goes on from what is done.")
    except Exception as error:
        told = sentence(error)
        if told is None:
            raise
        sys.exit(f"{verb}: {told}")


if __name__ == "__main__":
    main()
