"""`python -m training VERB [CONFIG.toml] [--option value ...]`: see `python -m training --help`."""

import logging
import sys

from training.cli import USAGE, VERBS, read_config


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in VERBS:
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print(USAGE) if asked else sys.exit(USAGE)
        return
    try:
        config, run = read_config(arguments[0], arguments[1:])
        run(config)
    except (ValueError, FileNotFoundError) as error:  # written for the person who reads it
        sys.exit(f"{arguments[0]}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{arguments[0]}: stopped; the same command goes on from what is done.")


if __name__ == "__main__":
    main()
