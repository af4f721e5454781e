"""The whole adapter: a projector and a layer for every attention that it adds to."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from .config import AdapterConfig, encoder_of_width
from .image_kv import Layer, image_key_values
from .projector import NEW_LAYER_SIGMA, Projector

# How the names of the weights begin that IPAdapter+ lacks.
INSTRUCT = tuple(
    f"image_proj.{name}" for name in ("new_input_layers.", "proj_new_input.", "prompt_layers.", "proj_prompt_input.")
)


class Adapter(nn.Module):
    """Its state dict is the released layout, flattened: ``image_proj.*`` and ``ip_adapter.{n}.to_k_ip.weight``.

    ``ops`` supplies ``Linear`` and ``LayerNorm``; a host passes its own, which cast and offload as it likes.
    """

    def __init__(self, config: AdapterConfig, ops: Any = nn) -> None:
        super().__init__()
        self.config = config
        self.image_proj = Projector(config, ops)
        self.ip_adapter = image_key_values(config, ops)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], metadata: Mapping[str, str] = {}, ops: Any = nn) -> "Adapter":
        """Build the adapter that a flat state dict holds and load it strictly, keeping the tensors' precision.

        Raises:
            ValueError: keys are missing or unexpected; the message names the first of them.
        """
        config = AdapterConfig.from_state_dict(state, metadata)
        try:
            with torch.device("meta"):  # the file's tensors take the place of every parameter
                expected = cls(config).state_dict()  # a host's own layers may have no weights before they are loaded
                adapter = cls(config, ops)
        except RuntimeError as error:
            raise ValueError("its weights name sizes that no adapter has") from error
        problems = {
            "missing": [key for key in expected if key not in state],
            "unexpected": [key for key in state if key not in expected],
            "of another shape": [k for k in expected if k in state and state[k].shape != expected[k].shape],
        }
        for problem, keys in problems.items():
            if keys:
                more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
                raise ValueError(f"{len(keys)} weights are {problem}: {', '.join(key[:80] for key in keys[:3])}{more}")
        # In the order of plain layers, not the file's: such layers take it for their own, and a hash depends on it.
        adapter.load_state_dict({key: state[key] for key in expected}, strict=True, assign=True)
        return adapter.requires_grad_(False).eval()

    @property
    def layers(self) -> list[Layer]:
        """One an attention, in key order."""
        return cast(list[Layer], list(self.ip_adapter.values()))

    def key_values(
        self, tokens: Tensor, embed: Callable[[Tensor], Tensor] = lambda tokens: tokens
    ) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [B, T, width] of each layer, in key order; what a layer hands on of the tokens is all that
        the next one sees of them.

        Args:
            tokens: the projector's output, [B, T, O].
            embed: how the base embeds its text, [B, T, O] -> [B, T, width], where tokens go through that too (SD3).
        """
        tokens, pairs = embed(tokens), []
        for layer in self.layers:
            pairs.append(layer(tokens))
            tokens = layer.handed_on(tokens)
        return pairs

    def with_instruction(
        self,
        instruction_width: int,
        prompt_width: int | None = None,
        generator: torch.Generator | None = None,
        sigma: float = NEW_LAYER_SIGMA,
    ) -> "Adapter":
        """A trainable instruct adapter that starts from this plain IPAdapter+ and equals it exactly (Sec. 3.5), its new
        layers' noise of standard deviation ``sigma``."""
        config = replace(
            self.config,
            instruction_width=instruction_width,
            prompt_width=prompt_width,
            instruction_encoder=encoder_of_width(instruction_width),
        )
        adapter = Adapter(config)
        adapter.image_proj.initialise_new_layers(generator, sigma)
        unknown = adapter.load_state_dict(self.state_dict(), strict=False).unexpected_keys
        assert not unknown, unknown
        return adapter
