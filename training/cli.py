"""Verbs and their typed settings: a TOML file, then options of the command line over it; an unknown one is an error."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tomllib

# verb: (module, its settings, what it does); imported on use, since most verbs import torch and diffusers.
VERBS: dict[str, tuple[str, str, str]] = {
    "instructions": ("training.instructions.extend", "InstructionsConfig", "add phrasings to the instruction bank"),
    "build": ("training.build", "BuildConfig", "source dataset -> shards of (condition, target, prompt)"),
    "encode": ("training.encode", "EncodeConfig", "shards -> features, every frozen encoder run once"),
    "train": ("training.train", "TrainConfig", "features or shards -> an adapter, on one card or many"),
    "export": ("training.export", "ExportConfig", "checkpoint -> the file that the nodes load"),
    "evaluate": ("training.evaluate", "EvaluateConfig", "adapters -> pictures and a table of CLIP scores"),
    "figures": ("training.figures", "FiguresConfig", "logs and pictures -> the paper's figures"),
}

USAGE = "\n".join(
    [
        "usage: python -m training VERB [CONFIG.toml] [--option value ...]",
        "",
        *(f"  {verb:<14}{what}" for verb, (_, _, what) in VERBS.items()),
        "",
        "`python -m training VERB --help` lists a verb's options. training/README.md walks from nothing to an adapter.",
    ]
)


def read_config(verb: str, arguments: Sequence[str]) -> tuple[Any, Callable[[Any], None]]:
    """A verb's settings and the function that takes them.

    Raises:
        ValueError: the file or an option names a setting that does not exist or has a value of the wrong kind.
    """
    import tyro

    module_name, config_name, what = VERBS[verb]
    module = importlib.import_module(module_name)
    kind = getattr(module, config_name)
    options = list(arguments)
    program = f"python -m training {verb}"
    if options and options[0].endswith(".toml"):
        program += f" {options[0]}"
        settings = read_toml(kind, Path(options.pop(0)))
        return tyro.cli(
            kind,
            prog=program,
            description=what,
            args=options,
            default=settings,
            config=(tyro.conf.EnumChoicesFromValues,),
        ), module.run
    return tyro.cli(
        kind, prog=program, description=what, args=options, config=(tyro.conf.EnumChoicesFromValues,)
    ), module.run


def read_toml(kind: type, path: Path) -> Any:
    """Raises ValueError with one sentence for a file that is missing, no TOML, or holds what is no setting."""
    from pydantic import ValidationError

    try:
        return kind(**tomllib.loads(path.read_text()))
    except FileNotFoundError:
        raise ValueError(f"There is no file {path}; the configs that come with it are in training/configs.") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        known = f"; its settings are {', '.join(kind.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise ValueError(f"{path}: {name}: {first['msg']}{known}.") from None
