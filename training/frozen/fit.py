"""Whether an adapter fits a base and encoders."""

from collections.abc import Mapping, Sequence

from ipadapter_instruct_core.config import AdapterConfig, Base


def check_fit(
    name: str, config: AdapterConfig, widths: Mapping[str, int | None], layers: Sequence[tuple[int, int]], base: Base
) -> None:
    """Whether an adapter reads what base and encoders give; a width of None is not looked at.

    SD3's and SD3.5's may have the same sizes, and nothing else in common.

    Raises:
        ValueError: it is for another base or another encoder.
    """
    if config.form is not base.form:
        raise ValueError(
            f"{name} is for another base: it is an adapter for {config.base.label}, the base is {base.label}."
        )
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
