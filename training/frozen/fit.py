"""Whether an adapter fits a base and encoders."""

from collections.abc import Mapping, Sequence

from ipadapter_instruct_core.config import AdapterConfig


def check_fit(
    name: str, config: AdapterConfig, widths: Mapping[str, int | None], layers: Sequence[tuple[int, int]]
) -> None:
    """Whether an adapter reads what base and encoders give; a width of None is not looked at.

    Raises:
        ValueError: it is for another base or another encoder.
    """
    if config.layers != tuple(layers) or config.output_width != widths["text"]:
        raise ValueError(
            f"{name} is for another base: it has {len(config.layers)} cross-attentions with tokens "
            f"{config.output_width} wide, the base {len(layers)} with {widths['text']}."
        )
    reads = {"image": config.image_width, "instruction": config.instruction_width, "prompt": config.prompt_width}
    for kind, width in reads.items():
        given = widths[kind]
        if None not in (width, given) and width != given:
            raise ValueError(
                f"{name} reads {kind} states {width} wide, the {kind} encoder gives {given}; "
                "take the encoder that it was trained with."
            )
