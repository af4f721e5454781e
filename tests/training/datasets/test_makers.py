"""Generated targets against diffusers' own pipelines: InstantStyle in the style blocks, scribbles by a ControlNet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generators import plain_state, save_plain, save_scribble
from PIL import Image
from safetensors.torch import load_file, save_file
from shards_of_photographs import photograph
from tiny_base import OPEN_CLIP, save_sd15, save_sdxl
from training.datasets.targets.canny import edge_map
from training.datasets.targets.makers import InstantStyleMaker, ScribbleMaker, target_maker
from training.datasets.targets.settings import InstantStyle, Scribble
from training.frozen.encoders import picture_tensor

NEGATIVE, GUIDANCE, STEPS = "blurry", 3.0, 4
PROMPTS = ["a house by the sea", "three apples"]
SEEDS = [11, 12]
COMMON = {"size": 64, "steps": STEPS, "guidance": GUIDANCE, "negative_prompt": NEGATIVE}


@pytest.fixture(scope="module")
def models(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "sd15").symlink_to(workshop / "base")
    (folder / "clip").symlink_to(workshop / "clip")
    save_sdxl(folder / "sdxl")
    for name in ("sd15", "sdxl"):
        save_plain(folder / f"{name}.safetensors", folder / name)
    save_scribble(folder / "scribble", folder / "sd15")
    return folder


def style_maker(models: Path, base: str = "sd15", **changes: object) -> InstantStyleMaker:
    adapter = models / f"{base}.safetensors"
    values = {"base": models / base, "adapter": adapter, "image_encoder": models / "clip", **COMMON}
    maker = target_maker(InstantStyle(**values | changes))
    assert isinstance(maker, InstantStyleMaker)
    return maker


@pytest.fixture(scope="module")
def styler(models: Path) -> InstantStyleMaker:
    return style_maker(models)


@pytest.fixture(scope="module")
def scribbler(models: Path) -> ScribbleMaker:
    maker = target_maker(Scribble(base=models / "sd15", controlnet=models / "scribble", scale=0.7, **COMMON))
    assert isinstance(maker, ScribbleMaker)
    return maker


CONDITIONS = [photograph("coffee"), photograph("chelsea")]


def array(pictures: list[Image.Image]) -> np.ndarray:
    """[B, 64, 64, 3] in 0..255."""
    return np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures])


def assert_same(found: list[Image.Image], expected: list[Image.Image] | np.ndarray) -> None:
    """But for rounding, which is one level here and there."""
    assert np.abs(array(found) - (expected if isinstance(expected, np.ndarray) else array(expected))).max() <= 2


def differ(found: list[Image.Image], other: list[Image.Image]) -> bool:
    return float(np.abs(array(found) - array(other)).mean(axis=(1, 2, 3)).min()) > 1


def pipeline(models: Path, name: str = "sd15", **parts: object) -> Any:
    """diffusers' own, with our sampler."""
    from diffusers import (
        DPMSolverMultistepScheduler,
        StableDiffusionControlNetPipeline,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )

    kind = StableDiffusionControlNetPipeline if parts else StableDiffusionPipeline
    pipe = (StableDiffusionXLPipeline if name == "sdxl" else kind).from_pretrained(models / name, **parts)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="dpmsolver++")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, number: int, **settings: object) -> np.ndarray:
    latents = torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(SEEDS[number]))[None]
    common = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "negative_prompt": NEGATIVE}
    size = {"height": 64, "width": 64, "output_type": "np"}
    return pipe(PROMPTS[number], latents=latents, **common, **size, **settings).images[0] * 255


def clip_embedding(models: Path, picture: Image.Image, content: str) -> torch.Tensor:
    """The picture's, minus half of the text's direction, by open_clip alone: [1, E]."""
    from ipadapter_instruct_core.encoders import preprocess
    from open_clip import CLIP, SimpleTokenizer

    model = CLIP(**OPEN_CLIP).eval()
    model.load_state_dict(load_file(models / "clip" / "open_clip_model.safetensors"))
    with torch.no_grad():
        image = model.encode_image(preprocess(picture_tensor(picture), 32))
        if not content:
            return image
        text = model.encode_text(SimpleTokenizer(context_length=77)([content]))
    return image - 0.5 * text / text.norm() * image.norm()


# Where InstantStyle injects: the block that diffusers' documentation names on SDXL, its authors' choice on SD1.5.
STYLE = {"sd15": {"up": {"block_1": 1.0}}, "sdxl": {"up": {"block_0": [0.0, 1.0]}}}


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_instant_style_is_diffusers_ip_adapter_in_the_style_block(models: Path, name: str) -> None:
    contents = ["a cup of coffee", ""]
    found = style_maker(models, name)(CONDITIONS, PROMPTS, SEEDS, contents)
    pipe = pipeline(models, name)
    nested: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in load_file(models / f"{name}.safetensors").items():
        group, _, rest = key.partition(".")
        nested[group][rest] = tensor
    pipe.load_ip_adapter(nested, subfolder="", weight_name="", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(STYLE[name])
    for number, content in enumerate(contents):
        embedding = clip_embedding(models, CONDITIONS[number], content)
        embeds = [torch.stack([torch.zeros_like(embedding), embedding])]
        expected = run(pipe, number, ip_adapter_image_embeds=embeds)
        assert_same(found[number : number + 1], expected[None])
    pipe.set_ip_adapter_scale(1.0)  # in every block it would be another picture
    assert np.abs(run(pipe, 1, ip_adapter_image_embeds=embeds) - array(found)[1]).mean() > 1


@pytest.mark.parametrize(
    ("name", "start"), [("sd15", "up_blocks.1."), ("sdxl", "up_blocks.0.attentions.1.transformer_blocks.")]
)
def test_only_the_style_blocks_get_keys_and_values(models: Path, name: str, start: str) -> None:
    maker = style_maker(models, name, scale=0.25)
    embedding = maker.style_embedding(CONDITIONS, ["", ""])
    names = [layer for layer in maker.base.network.attn_processors if ".attn2." in layer]
    whole = maker.adapter(embedding)
    found = maker.key_values(embedding)
    assert len(found) == len(names) == len(whole)
    assert [part is not None for part in found] == [layer.startswith(start) for layer in names]
    assert 0 < sum(part is not None for part in found) < len(found)
    for part, (keys, values) in zip(found, whole, strict=True):
        if part is not None:
            assert torch.equal(part[0], keys) and torch.equal(part[1], values * 0.25)


def test_the_contents_text_changes_the_picture_and_no_text_does_not(models: Path, styler: InstantStyleMaker) -> None:
    pictures = {text: styler(CONDITIONS, PROMPTS, SEEDS, [text, text]) for text in ("", "a cup", "a cat on a chair")}
    assert differ(pictures["a cup"], pictures[""]) and differ(pictures["a cup"], pictures["a cat on a chair"])
    unchanged = style_maker(models, content_scale=0.0)(CONDITIONS, PROMPTS, SEEDS, ["a cup", "a cup"])
    assert np.array_equal(array(unchanged), array(pictures[""]))
    plain = styler.style_embedding(CONDITIONS, ["", ""])
    found = styler.style_embedding(CONDITIONS, ["a cup", ""])
    torch.testing.assert_close(found[:1], clip_embedding(models, CONDITIONS[0], "a cup"), rtol=1e-4, atol=1e-4)
    assert torch.equal(found[1], plain[1])


def test_a_picture_depends_on_its_own_condition_prompt_and_seed(styler: InstantStyleMaker) -> None:
    contents = ["a cup", ""]
    pictures = styler(CONDITIONS, PROMPTS, SEEDS, contents)
    assert all(picture.size == (64, 64) and np.asarray(picture).std() > 5 for picture in pictures)
    assert np.array_equal(array(styler(CONDITIONS, PROMPTS, SEEDS, contents)), array(pictures))
    ones = [styler([c], [p], [s], [t])[0] for c, p, s, t in zip(CONDITIONS, PROMPTS, SEEDS, contents, strict=True)]
    assert_same(ones, pictures)
    assert differ(styler(CONDITIONS, PROMPTS, [1, 2], contents), pictures)
    assert differ(styler(CONDITIONS, PROMPTS[::-1], SEEDS, contents), pictures)
    assert differ(styler(CONDITIONS[::-1], PROMPTS, SEEDS, contents[::-1]), pictures)


def edges() -> list[Image.Image]:
    return [edge_map(condition, 64) for condition in CONDITIONS]


def test_a_scribble_is_diffusers_control_net(models: Path, scribbler: ScribbleMaker) -> None:
    from diffusers import ControlNetModel

    pipe = pipeline(models, controlnet=ControlNetModel.from_pretrained(models / "scribble"))
    found = scribbler(edges(), PROMPTS, SEEDS, ["", ""])
    for number, edge in enumerate(edges()):
        expected = run(pipe, number, image=edge, controlnet_conditioning_scale=0.7)
        assert_same(found[number : number + 1], expected[None])


def test_the_edges_make_the_picture(scribbler: ScribbleMaker) -> None:
    found = scribbler(edges(), PROMPTS, SEEDS, ["", ""])
    empty = [Image.new("RGB", (64, 64))] * 2
    assert differ(scribbler(edges()[::-1], PROMPTS, SEEDS, ["", ""]), found)
    assert differ(scribbler(empty, PROMPTS, SEEDS, ["", ""]), found)
    assert differ(scribbler(edges(), PROMPTS, [1, 2], ["", ""]), found)
    assert np.array_equal(array(scribbler(edges(), PROMPTS, SEEDS, ["", ""])), array(found))
    ones = [scribbler([e], [p], [s], [""])[0] for e, p, s in zip(edges(), PROMPTS, SEEDS, strict=True)]
    assert_same(ones, found)


def of_changed(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path, Path], Path]:
    def made(models: Path, folder: Path) -> Path:
        state = plain_state(models / "sd15")
        change(state)
        save_file(state, folder / "other.safetensors")
        return folder / "other.safetensors"

    return made


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        pytest.param(
            lambda models, folder: models.parent / "start.safetensors",
            r"^start.safetensors is no plain IPAdapter; InstantStyle needs one without a resampler, as",
            id="plus",
        ),
        pytest.param(
            of_changed(lambda state: state.pop("ip_adapter.3.to_v_ip.weight")),
            "^other.safetensors is not a whole plain IPAdapter .*ip_adapter.3.to_v_ip.weight.*; download it again",
            id="lacking",
        ),
        pytest.param(
            of_changed(lambda state: [state.pop(f"ip_adapter.7.to_{kind}_ip.weight") for kind in "kv"]),
            "^other.safetensors is for another base: its cross-attentions are not those of .*sd15",
            id="base",
        ),
        pytest.param(
            lambda models, folder: save_plain(folder / "other.safetensors", models / "sd15", embedding=99),
            "^other.safetensors reads embeddings 99 wide, clip gives 24; take the image encoder that it was",
            id="encoder",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_told(
    workshop: Path, models: Path, tmp_path: Path, adapter: Callable[[Path, Path], Path], told: str
) -> None:
    path = adapter(models, tmp_path)
    path = workshop / path.name if path.name == "start.safetensors" else path
    with pytest.raises(ValueError, match=told) as caught:
        style_maker(models, adapter=path)
    assert "\n" not in str(caught.value)


def test_a_base_without_a_style_block_is_told(models: Path, tmp_path: Path) -> None:
    base = save_sd15(tmp_path / "base", up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    adapter = save_plain(tmp_path / "plain.safetensors", base)
    with pytest.raises(ValueError, match=r"base has no style block up_blocks.1. to inject the style into\.$"):
        style_maker(models, base=base, adapter=adapter)


def test_what_is_no_control_net_is_told(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sd15 (is no folder|cannot be read as a) .*ControlNet") as caught:
        target_maker(Scribble(base=models / "sd15", controlnet=models / "sd15", **COMMON))
    assert "\n" not in str(caught.value)
