"""What a run trains on: its base, its samples, and the encoders where these are raw."""

from typing import Any

from ipadapter_instruct_core.config import InstructionEncoder
from training.datasets.shards import Tally
from training.features.stored import FeatureSource, RawSource, Source
from training.frozen.base import FrozenBase, fingerprint, load_base
from training.frozen.encoders import EncoderPaths, Encoders, load_encoders
from training.instructions import load_bank
from training.train.settings import TrainConfig


def load_data(config: TrainConfig, tally: Tally) -> tuple[FrozenBase, Encoders | None, Source, Source | None]:
    """The base, the encoders where raw shards are trained on, the training samples, and those for validation."""
    validate = config.validation.every > 0
    fixed_share = 1.0 if config.instructions == "fixed" else config.fixed_share
    if config.features is not None:
        source = FeatureSource(config.features, "train", tally, fixed_share)
        base = load_base(config.base, config.base_config, with_t5=False)
        hold_to_encoders(source, base)
        validation = FeatureSource(config.features, "validation", tally, 1.0) if validate else None
        return base, None, source, validation
    assert config.image_encoder is not None  # as the settings themselves hold it
    paths = EncoderPaths(
        base=config.base,
        image_encoder=config.image_encoder,
        instruction_encoder=config.instruction_encoder,
        base_config=config.base_config,
    )
    encoders = load_encoders(paths, with_network=True)
    made = (encoders.preprocess, config.resolution, load_bank())
    channels = encoders.base.latent_channels
    source = RawSource(config.data, "train", tally, *made, fixed_share, channels)
    validation = RawSource(config.data, "validation", tally, *made, 1.0, channels) if validate else None
    return encoders.base, encoders, source, validation


def hold_to_encoders(source: FeatureSource, base: FrozenBase) -> None:
    """Raises ValueError where features were made with other encoders than the base's."""
    made, own = source.settings["encoders"], base.identities()
    for name, identity in own.items():
        if made.get(name) != identity:
            raise ValueError(
                f"The features in {source.features} were made with another {name.replace('_', ' ')} than this base "
                f"has ({made.get(name)}, not {identity}); encode the data with this base, or train on that one."
            )


def state_widths(source: Source, encoders: Encoders | None) -> dict[str, int]:
    """Width of each kind of states: of the picture, the instruction, the prompt, and the UNet's text."""
    if encoders is not None:
        return encoders.widths()
    assert isinstance(source, FeatureSource)
    rows = source.rows
    states = {"image": rows["zero_image"], "text": rows["empty_text"], "instruction": rows["empty_instruction"]}
    states["prompt"] = rows.get("empty_prompt", rows["empty_text"])
    return {name: tensor.shape[-1] for name, tensor in states.items()}


def instruction_encoder(source: Source, encoders: Encoders | None) -> InstructionEncoder:
    if encoders is not None:
        return encoders.instruction_encoder
    assert isinstance(source, FeatureSource)
    return InstructionEncoder(source.settings["instruction_encoder"])


def identity(base: FrozenBase, encoders: Encoders | None, source: Source) -> dict[str, Any]:
    """What a run's files hold: the base, the encoders behind the samples, the samples, and the instructions."""
    counts = {task.value: len(places) for task, places in source.by_task.items()}
    if encoders is not None:
        behind = encoders.identities()
    else:
        assert isinstance(source, FeatureSource)
        behind = source.settings["encoders"]
    facts = {
        "unet": fingerprint(base.network),
        "encoders": behind,
        "samples": dict(sorted(counts.items())),
        "shards": source.sha256,
        "wordings": source.wordings_sha256(),
    }
    return {name: fact for name, fact in facts.items() if fact}  # features of an older version tell no wordings
