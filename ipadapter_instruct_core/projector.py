"""(image, instruction, prompt) -> adapter tokens: the paper's projector and the released one, in one class."""

from typing import Any

import torch
from torch import Tensor, nn

from .config import AdapterConfig
from .layers import PerceiverAttention, feed_forward

# White noise of the new residual layers at the start of training (paper, Sec. 3.5).
NEW_LAYER_SIGMA = 1e-4


class Projector(nn.Module):
    """A resampler of learned latents over image tokens, told by instruction tokens what to look for.

    Each of ``depth`` layers attends to the image, then (released weights only) to the prompt, then
    (all but plain IPAdapter+) to the instruction; every step is residual. Parameter names are the
    released files' own, so that a file loads strictly: ``new_input`` is the instruction.
    """

    def __init__(self, config: AdapterConfig, ops: Any = nn) -> None:
        super().__init__()
        self.config = config
        c = config

        def stack(ff_mult: int) -> nn.ModuleList:
            return nn.ModuleList(
                nn.ModuleList([PerceiverAttention(c.width, c.heads, ops), feed_forward(c.width, ff_mult, ops)])
                for _ in range(c.depth)
            )

        self.latents = nn.Parameter(torch.randn(1, c.token_count, c.width) / c.width**0.5)
        self.proj_in = ops.Linear(c.image_width, c.width)
        self.layers = stack(c.image_ff_mult)
        if c.prompt_width is not None:
            self.proj_prompt_input = ops.Linear(c.prompt_width, c.width)
            self.prompt_layers = stack(c.instruction_ff_mult)
        if c.instruction_width is not None:
            self.proj_new_input = ops.Linear(c.instruction_width, c.width)
            self.new_input_layers = stack(c.instruction_ff_mult)
        self.add_module(f"proj_out{c.output_suffix}", ops.Linear(c.width, c.output_width))
        self.add_module(f"norm_out{c.output_suffix}", ops.LayerNorm(c.output_width))

    def forward(self, image: Tensor, instruction: Tensor | None = None, prompt: Tensor | None = None) -> Tensor:
        """Adapter tokens of a batch of pictures.

        Args:
            image: penultimate hidden states of the image tower, [B, N, image_width].
            instruction: hidden states of the instruction, [B, L, instruction_width]; not read by IPAdapter+.
            prompt: hidden states of the text prompt, [B, L, prompt_width]; read by the released weights only.

        Returns:
            [B, T, O].
        """
        sources = [self.proj_in(image)]
        stacks = [self.layers]
        if self.config.prompt_width is not None:
            sources.append(self.proj_prompt_input(prompt))
            stacks.append(self.prompt_layers)
        if self.config.instruction_width is not None:
            sources.append(self.proj_new_input(instruction))
            stacks.append(self.new_input_layers)

        # Not kept by the host's casting layers: follows the input's device and precision itself.
        latents = self.latents.to(sources[0]).expand(image.shape[0], -1, -1)
        for layer in zip(*stacks, strict=True):
            for source, (attention, feed) in zip(sources, layer, strict=True):
                latents = latents + attention(source, latents)
                latents = latents + feed(latents)
        project, norm = (self.get_submodule(f"{name}{self.config.output_suffix}") for name in ("proj_out", "norm_out"))
        return norm(project(latents))

    def initialise_new_layers(self, generator: torch.Generator | None = None, sigma: float = NEW_LAYER_SIGMA) -> None:
        """Start the layers that IPAdapter+ lacks as the paper does (Sec. 3.5): noise inside, zero at the end.

        With the final weight of each residual branch at zero, the projector equals IPAdapter+'s exactly.

        Args:
            sigma: standard deviation of the noise. The first gradients of the zeros grow with it.
        """
        for name in ("prompt_layers", "new_input_layers"):
            for attention, feed in getattr(self, name, []):
                for parameter in [*attention.parameters(), *feed.parameters()]:
                    if parameter.ndim > 1:
                        nn.init.normal_(parameter, std=sigma, generator=generator)
                nn.init.zeros_(attention.to_out.weight)
                nn.init.zeros_(feed[-1].weight)
