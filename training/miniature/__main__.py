"""`python -m training.miniature VERB [--option value ...]`: see `python -m training.miniature --help`."""

import importlib
import logging
import sys

# verb: (module, its settings, what it does); imported on use, since most verbs import torch.
VERBS: dict[str, tuple[str, str, str]] = {
    "sheet": ("world.sheet", "SheetConfig", "pictures of the world on one sheet"),
    "build": ("world.samples", "BuildConfig", "shards of (condition, target, prompt), as other datasets give them"),
    "autoencoder": ("models.autoencoder", "AutoencoderConfig", "train the autoencoder"),
    "oracle": ("models.oracle", "OracleConfig", "train the classifiers that say what a picture shows"),
    "clip": ("models.clip", "ClipConfig", "train the small CLIP"),
    "text-tower": ("models.text_tower", "TextTowerConfig", "teach the CLIP instructions in more words"),
    "base": ("models.train_base", "BaseConfig", "train the text-to-image model"),
    "controlnet": ("models.controlnet", "ControlNetConfig", "train the scribble ControlNet"),
    "lora": ("models.lora", "LoraConfig", "train the style LoRA"),
    "keep": ("models.weights", "KeepConfig", "round weights to eight bits and ship them"),
    "start": ("models.start", "StartConfig", "write the random IPAdapter+ from which the first adapter is trained"),
    "evaluate-base": (
        "judged.evaluate_base",
        "EvaluateBaseConfig",
        "how often the text-to-image model follows its caption",
    ),
    "evaluate": (
        "judged.evaluate",
        "EvaluateConfig",
        "adapters on held-out combinations, by the oracle: counts and tables",
    ),
    "curves": ("judged.curves", "CurvesConfig", "what runs had learned at each of their snapshots, by the oracle"),
    "readout": ("judged.readout", "ReadoutConfig", "what can be read from the CLIP's states and an adapter's tokens"),
    "report": ("judged.report", "ReportConfig", "write the tables of `evaluate` again"),
    "judge": (
        "judged.judge",
        "JudgeConfig",
        "what the CLIP scores of `python -m training evaluate` are worth, by the oracle",
    ),
    "wordings": ("judged.wordings", "WordingsConfig", "how alike the CLIP reads the instructions of each two tasks"),
    "rounding": ("judged.rounding", "RoundingConfig", "what other weights cost: two results of evaluate, by figure"),
    "expand": (
        "expand.write",
        "ExpandConfig",
        "write a models folder for ComfyUI, or the models for `python -m training`",
    ),
}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in VERBS:
        lines = "\n".join(f"  {verb:<14}{what}" for verb, (_, _, what) in VERBS.items())
        usage = f"usage: python -m training.miniature VERB [--option value ...]\n\n{lines}"
        print(usage) if arguments and arguments[0] in ("-h", "--help") else sys.exit(usage)
        return
    import tyro

    verb = arguments[0]
    name, settings, what = VERBS[verb]
    module = importlib.import_module(f"training.miniature.{name}")
    try:
        program = f"python -m training.miniature {verb}"
        module.run(tyro.cli(getattr(module, settings), prog=program, description=what, args=arguments[1:]))
    except (ValueError, FileNotFoundError) as error:  # written for the person who reads it
        sys.exit(f"{verb}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{verb}: stopped; the same command goes on from what is done.")


if __name__ == "__main__":
    main()
