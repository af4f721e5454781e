"""Verbs and their typed settings: a TOML file, then options of the command line over it; an unknown one is an error."""

import difflib
import errno
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tomllib

# verb: (module, its settings, what it does); imported on use, since most verbs import torch and diffusers.
VERBS: dict[str, tuple[str, str, str]] = {
    "instructions": ("training.instructions.extend", "InstructionsConfig", "Add phrasings to the instruction bank."),
    "build": ("training.datasets.build", "BuildConfig", "Source dataset -> shards of (condition, target, prompt)."),
    "encode": ("training.features.encode", "EncodeConfig", "Shards -> features: every frozen encoder is run once."),
    "train": ("training.train.loop", "TrainConfig", "Features or shards -> an adapter, on one card or many."),
    "export": ("training.train.export", "ExportConfig", "Checkpoint -> the file that the nodes load."),
    "evaluate": ("training.evaluate.evaluate", "EvaluateConfig", "Adapters -> pictures and a table of CLIP scores."),
    "figures": ("training.evaluate.figures", "FiguresConfig", "Logs and pictures -> the paper's figures."),
}

USAGE = "\n".join(
    [
        "usage: python -m training VERB [CONFIG.toml] [--option value ...]",
        "",
        *(f"  {verb:<14}{what}" for verb, (_, _, what) in VERBS.items()),
        "",
        "An option is a setting's name with hyphens, a nested one's with a dot: --validation.every 500. Options count",
        "over the file. `python -m training VERB --help` lists them, `python -m training VERB CONFIG.toml --help` with",
        "the file's values. Configs are in training/configs; training/README.md walks from nothing to an adapter.",
    ]
)


def read_config(verb: str, arguments: Sequence[str]) -> tuple[Any, Callable[[Any], None]]:
    """A verb's settings and the function that takes them.

    Raises:
        ValueError: the file or an option names a setting that does not exist or has a value of the wrong kind.
    """
    from training.cli.options import parse_options

    module_name, config_name, what = VERBS[verb]
    module = importlib.import_module(module_name)
    kind, options, settings = getattr(module, config_name), list(arguments), None
    program = f"python -m training {verb}"
    if options and options[0].endswith(".toml"):
        program += f" {options[0]}"
        settings = read_toml(kind, Path(options.pop(0)))
    return parse_options(kind, options, program, what, settings), module.run


def read_toml(kind: type, path: Path) -> Any:
    """Raises ValueError with one sentence for a file that is missing, no TOML, or holds what is no setting."""
    from pydantic import ValidationError
    from training.cli.options import why_invalid

    try:
        return kind(**tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(f"There is no file {path}; the configs that come with it are in training/configs.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}.") from None
    except ValidationError as error:
        raise ValueError(f"{path}: {why_invalid(kind, error)}") from None


def unknown_verb(verb: str) -> str:
    """What to say to a verb that does not exist."""
    close = difflib.get_close_matches(verb, VERBS, 1)
    return f"There is no verb {verb}; {f'perhaps {close[0]} is meant' if close else 'they are ' + ', '.join(VERBS)}."


def sentence(error: Exception) -> str | None:
    """An error as a sentence for the person who runs a verb; None for one that only a programmer can make use of."""
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "The disk is full; make room and give the same command again, which goes on from what is done."
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename} cannot be used: {error.strerror}."
    if isinstance(error, FileNotFoundError):  # our own, with a sentence
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's; torch may not be imported
        return (
            "The card's memory is full; lower the size of batches or validation.pictures, or train with "
            "--gradient-checkpointing."
        )
    return None
