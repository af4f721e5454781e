"""The real host inside this process, on random weights: models, our pack's Apply, and the host's own sampling."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tools.tiny import sd3 as tiny_sd3
from tools.tiny.adapter_shapes import projector_shapes
from tools.tiny.models import adapter_gain, checkpoint, unet_gain
from tools.tiny.shapes import FULL_UNET, TEXT
from tools.tiny.strided_weights import strided_weights

ROOT = Path(__file__).resolve().parent.parent
CFG = 5.0
SDXL_TEXT = 2048
THREE_WAY = {"guidance": "three-way", "instruct_scale": 2.0, "image_scale": 0.5}  # no factor is 0: four rows
SIZES = ("small", "real")


def load_module(name: str, path: Path, package: bool = False) -> ModuleType:
    """Load a module by its place, once."""
    if name not in sys.modules:
        locations = [str(path.parent)] if package else None
        spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=locations)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def prepare() -> ModuleType:
    """Make the host importable, without importing it; returns the tests' way into it."""
    # Our own `nodes/` would hide the host's `nodes.py`.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    inside = load_module("benchmarks_inside", ROOT / "tests" / "host" / "inside.py")
    if inside.PACK not in sys.modules:
        sys.path.insert(0, str(inside.HOST))
        import comfy.options

        comfy.options.args_parsing = False
        import comfy.cli_args

        # What the host takes on graphics cards, where most people run it; on a CPU it defaults to a slower one.
        comfy.cli_args.args.use_pytorch_cross_attention = True
        logging.getLogger().setLevel(logging.WARNING)
    return inside


def start() -> Callable[[str], ModuleType]:
    """The host with our pack in it. Returns ``pack("nodes.apply")``, which imports a module of the pack."""
    inside = prepare()
    inside.start()
    return lambda name: importlib.import_module(f"{inside.PACK}.{name}")


def unet(size: str) -> Any:
    """A MODEL with SD1.5's 16 cross-attentions: of its real dimensions, or small, where launches take the time."""
    import comfy.sd

    if size == "real":
        return random_model("sd15", torch.float32)
    return comfy.sd.load_diffusion_model_state_dict(checkpoint(FULL_UNET, seed=1))


def sd3() -> Any:
    """A MODEL of SD3's form, small: four blocks, of which the adapter adds to two."""
    import comfy.sd

    weights = {key: weight.contiguous() for key, weight in tiny_sd3.transformer(seed=1).items()}
    return comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float32})


_SD15 = {
    "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "context_dim": TEXT, "num_heads": 8, "use_linear_in_transformer": False,
}  # fmt: skip
_SDXL = {
    "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "context_dim": SDXL_TEXT, "num_head_channels": 64, "use_linear_in_transformer": True,
    "num_classes": "sequential", "adm_in_channels": 2816,
}  # fmt: skip


def random_model(base: str, dtype: torch.dtype, channels: int = 320) -> Any:
    """A MODEL of the host's own SD1.5 or SDXL classes, of so many channels on its first level; random weights."""
    import comfy.model_management as management
    import comfy.supported_models as supported
    from comfy.model_patcher import ModelPatcher

    kind, layers = {"sd15": (supported.SD15, _SD15), "sdxl": (supported.SDXL, _SDXL)}[base]
    layers = layers | ({"num_head_channels": min(64, channels)} if base == "sdxl" else {})
    common = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": channels, "legacy": False}
    config = kind({**common, "use_spatial_transformer": True, **layers})
    config.set_inference_dtype(dtype, None)
    device = management.get_torch_device()
    model = config.get_model({}, device=device)
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=unet_gain(name) / weight[0].numel() ** 0.5, generator=generator)
            else:
                weight.fill_(float(name.endswith("weight")))
    return ModelPatcher(model, load_device=device, offload_device=management.unet_offload_device())


def adapter_weights(widths: list[int], instruct: bool = True, text: int = TEXT) -> dict[str, dict[str, torch.Tensor]]:
    """An adapter for cross-attentions of these widths that read a ``text`` so wide (SD1.5's or SDXL's): the released
    layout, or IPAdapter+'s, which is the same without the prompt and the instruction."""
    shapes = projector_shapes(TEXT if text == TEXT else 1280, output=text)
    if not instruct:
        shapes = {key: shape for key, shape in shapes.items() if "new_input" not in key and "prompt" not in key}
    names = [f"{2 * i + 1}.to_{kind}_ip.weight" for i in range(len(widths)) for kind in ("k", "v")]
    key_values = {name: (widths[i // 2], text) for i, name in enumerate(names)}
    groups = {
        "image_proj": strided_weights(shapes, adapter_gain, seed=6),
        "ip_adapter": strided_weights(key_values, adapter_gain, seed=7),
    }
    # Laid out as in a real file: matrices of overlapping rows would be copied at each use.
    return {group: {key: w.contiguous() for key, w in weights.items()} for group, weights in groups.items()}


class RandomVision:
    """Stands in for ViT-H/14 where its own time does not count: any picture gives the same random states."""

    image_size = 224

    def __init__(self) -> None:
        import comfy.model_management as management
        from comfy.model_patcher import ModelPatcher

        self.load_device = management.get_torch_device()
        self.model = _RandomStates()
        self.patcher = ModelPatcher(self.model, self.load_device, management.unet_offload_device())

    def encode_image(self, image: torch.Tensor) -> Any:
        import comfy.model_management as management

        management.load_model_gpu(self.patcher)
        return _Encoded(self.model(image, -2)[1])


class _Encoded:
    def __init__(self, states: torch.Tensor) -> None:
        self.penultimate_hidden_states = states


class _RandomStates(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.states = torch.nn.Parameter(random(1, 257, 1280, seed=8), requires_grad=False)

    def forward(self, pixel_values: torch.Tensor, intermediate_output: int) -> tuple[torch.Tensor, ...]:
        states = self.states.expand(len(pixel_values), -1, -1)
        return states, states, states[:, 0]


def sites_of(model: Any) -> list[Any]:
    """The attentions of a MODEL that an adapter adds to."""
    return start()("nodes.host.sites").sites(model.model.diffusion_model)


class Ours:
    """Our Apply node over one MODEL, everything that feeds it in place."""

    def __init__(self, model: Any, vision: Any = None) -> None:
        pack = start()
        sites = sites_of(model)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "adapter.bin"
            widths, text = [site.width for site in sites], sites[0].text_width
            torch.save(tiny_sd3.adapter(seed=6) if text == tiny_sd3.TEXT else adapter_weights(widths, text=text), file)
            self.adapter = pack("nodes.host.memory").load_adapter(str(file), file.name)
        tasks, guidance = pack("ipadapter_instruct_core.tasks"), pack("ipadapter_instruct_core.guidance")
        texts = {row: (random(1, 77, TEXT, seed=i), random(1, 77, TEXT, seed=9)) for i, row in enumerate(guidance.Row)}
        encoded = pack("nodes.encode_instruction").EncodedInstruction
        self.instruction = encoded(tasks.Task.STYLE, "use the style", self.adapter.config, texts)
        other = {row: (random(1, 77, TEXT, seed=20 + i), text[1]) for i, (row, text) in enumerate(texts.items())}
        self.other_instruction = encoded(tasks.Task.FACE, "use the face", self.adapter.config, other)
        self.node = pack("nodes.apply").ApplyAdapter
        self.model = model
        self.vision = vision or RandomVision()

    def references(self) -> dict[str, dict[str, Any]]:
        """References in place of the picture, as inputs of `apply`: one, two combined, and one to keep away from."""
        pack = start()
        encode, combine = pack("nodes.encode_reference").encode_reference, pack("ipadapter_instruct_core.reference")
        settings = {"crop_position": "pad", "colour": "random", "seed": 0, "use_mask": "zoom", "margin": 0.0}
        image = pack("nodes.prepare_reference").prepare(picture(), **settings, size=224)
        one, other = (
            encode(self.adapter, instruction, self.vision, image, "concatenate")
            for instruction in (self.instruction, self.other_instruction)
        )
        combined = combine.combine([one, other], [1.0, 3.0], mean=False)
        return {
            "a reference": {"reference": one},
            "a combined reference": {"reference": combined},
            "a negative reference": {"reference": one, "negative_reference": other},
        }

    def apply_all(self) -> Any:
        """Every node on references in one chain, with a curve."""
        given = self.references()
        both = given["a combined reference"] | {"negative_reference": given["a reference"]["reference"]}
        return self.apply_reference(**both, weight_curve="ease in-out")

    def apply_reference(self, **settings: Any) -> Any:
        return self.node.execute(self.model, self.adapter, **({"guidance": "simple"} | settings)).result[0]

    def apply(self, image: torch.Tensor | None = None, **settings: Any) -> Any:
        defaults = {
            "weight": 1.0, "start_percent": 0.0, "end_percent": 1.0, "guidance": "simple", "instruct_scale": 2.0,
            "image_scale": 1.0, "combine_images": "concatenate",
        }  # fmt: skip
        return self.node.execute(
            self.model, self.adapter, self.instruction, self.vision,
            picture() if image is None else image, **(defaults | settings),
        ).result[0]  # fmt: skip


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture() -> torch.Tensor:
    return torch.rand(1, 224, 224, 3, generator=torch.Generator().manual_seed(10))


def half_mask() -> torch.Tensor:
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1.0
    return mask


def with_rows(model: Any, more: int) -> Any:
    """A clone of a bare MODEL that evaluates the negative prompt ``more`` times over, with nothing done to the
    results: what rows cost by themselves."""
    from comfy.patcher_extension import WrappersMP

    def evaluate(executor: Callable, model: Any, conds: list, *arguments: Any) -> list[torch.Tensor]:
        return executor(model, [*conds, *[conds[1]] * more], *arguments)[: len(conds)]

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "benchmark", evaluate)
    return clone


def sample(
    model: Any, latent: int, steps: int, on_step: Callable[[int], None] | None = None, batch: int = 1
) -> torch.Tensor:
    """Sample with KSampler's own parts (euler, normal, cfg 5); ``on_step(i)`` is called after the i-th model step."""
    import comfy.samplers

    width, channels = sites_of(model)[0].text_width, model.model.latent_format.latent_channels
    pooled = {SDXL_TEXT: 1280, tiny_sd3.TEXT: tiny_sd3.POOLED}.get(width)
    pooled = {"pooled_output": random(1, pooled, seed=14)} if pooled else {}
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds([[random(1, 77, width, seed=11), pooled]], [[random(1, 77, width, seed=12), pooled]])
    guider.set_cfg(CFG)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
    noise = random(batch, channels, latent, latent, seed=13)
    return guider.sample(
        noise,
        torch.zeros_like(noise),
        comfy.samplers.sampler_object("euler"),
        sigmas,
        callback=lambda i, denoised, x, total: on_step(i) if on_step else None,
        disable_pbar=True,
        seed=0,
    )
