"""Folders, towers and model families, in the test's own process: what needs the host's classes but no server."""

from __future__ import annotations

import importlib
import json
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import inside
import pytest
import torch
from ipadapter_instruct_core.encoders import preprocess
from safetensors.torch import save_file
from tools.tiny.models import MIN_ADAPTER, make_tiny_models

inside.start()

import comfy.clip_vision  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sd1_clip  # noqa: E402
import comfy.sdxl_clip  # noqa: E402
import comfy.supported_models  # noqa: E402
import folder_paths  # noqa: E402
from comfy.ldm.flux.model import FluxParams  # noqa: E402

import nodes as host_nodes  # noqa: E402

folders, vision, text, host_apply, memory = (
    importlib.import_module(f"{inside.PACK}.nodes.host.{name}")
    for name in ("folders", "vision", "text", "apply", "memory")
)
apply, encode_instruction, references, guider, load_model = (
    importlib.import_module(f"{inside.PACK}.nodes.{name}")
    for name in ("apply", "encode_instruction", "encode_reference", "guider", "load_model")
)
load_open_clip, load_reference, prepare_reference = (
    importlib.import_module(f"{inside.PACK}.nodes.{name}")
    for name in ("load_open_clip", "load_reference", "prepare_reference")
)
core_config = importlib.import_module(f"{inside.PACK}.ipadapter_instruct_core.config")
core_encoders = importlib.import_module(f"{inside.PACK}.ipadapter_instruct_core.encoders")
CONFIG = core_config.AdapterConfig(layers=((1, 320), (3, 320), (5, 320)))
HOST_COMFY = Path(comfy.clip_vision.__file__).parent


def sentence(caught: Any) -> str:
    message = str(caught.value)
    assert "\n" not in message and 30 < len(message) < 330 and message.endswith("."), message
    return message


# Folders.


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty folders in place of the host's."""
    for name in ("ipadapter_instruct", "ipadapter", "clip_vision", "text_encoders", "ipadapter_instruct_references"):
        (tmp_path / name).mkdir()
        entry = ([str(tmp_path / name)], set(folders.EXTENSIONS))
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, entry)
        folder_paths.filename_list_cache.pop(name, None)
    yield tmp_path
    folder_paths.filename_list_cache.clear()


def put(path: Path, weights: dict) -> None:
    torch.save(weights, path)
    folder_paths.filename_list_cache.clear()


def test_empty_folders_are_told(models: Path) -> None:
    assert folders.adapter_names() == [] and folders.open_clip_names() == []
    load_model.LoadModel.define_schema()
    load_open_clip.LoadOpenClip.define_schema()
    for name in ("", "ip-adapter-instruct-sd15.bin"):
        message = load_model.LoadModel.validate_inputs(adapter_name=name)
        assert "put an adapter such as ip-adapter-instruct-sd15.bin into" in message
        assert str(models / "ipadapter_instruct") in message and "press R" in message
        with pytest.raises(ValueError, match="put an adapter such as"):
            load_model.LoadModel.execute(adapter_name=name)
    assert "put an OpenCLIP model into" in load_open_clip.LoadOpenClip.validate_inputs(model_name="x.bin")


def test_a_name_that_comes_by_a_link_is_not_judged_yet() -> None:
    assert load_model.LoadModel.validate_inputs() is True
    assert load_open_clip.LoadOpenClip.validate_inputs() is True


def test_a_name_that_comes_by_a_link_leaves_what_was_loaded() -> None:
    """The host asks with no name, and takes an error for a change at every run."""
    for loader, name in (
        (load_model.LoadModel, "adapter_name"),
        (load_open_clip.LoadOpenClip, "model_name"),
        (load_reference.LoadReference, "reference_name"),
    ):
        assert loader.fingerprint_inputs(**{name: None}) == loader.fingerprint_inputs() == ""


@pytest.mark.parametrize("taken, wanted", [("Oil", "oil"), ("\u00e4", "a\u0308")])
def test_a_new_name_is_new_where_case_and_spelling_do_not_count(models: Path, taken: str, wanted: str) -> None:
    (models / "ipadapter_instruct_references" / f"{taken}_00001.safetensors").touch()
    assert folders.new_reference_path(wanted).name == f"{wanted}_00002.safetensors"


@pytest.mark.parametrize(
    "name",
    ["\u6cb9" * 100, "\u6cb9" * 100 + "/oil", "a:b", "why?", "a\nb", 'a"b'],
    ids=["long", "long folder", "colon", "question", "line", "quote"],
)
def test_what_some_file_system_does_not_take_is_no_name(models: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is no name for a file"):
        folders.new_reference_path(name)


def test_of_the_shared_folder_only_what_fits_is_offered(models: Path) -> None:
    latents = {"latents": torch.zeros(1, 16, 8)}
    shared = models / "ipadapter"
    put(models / "ipadapter_instruct" / "own.bin", {})
    put(shared / "ip-adapter-plus_sd15.bin", {"image_proj": latents, "ip_adapter": {}})
    put(shared / "ip-adapter_sd15.bin", {"image_proj": {"proj.weight": torch.zeros(2)}, "ip_adapter": {}})
    put(shared / "ip-adapter-faceid-plus.bin", {
        "image_proj": {"perceiver_resampler.proj_in.weight": torch.zeros(2), **latents},
        "ip_adapter": {"0.to_q_lora.down.weight": torch.zeros(2)},
    })  # fmt: skip
    put(shared / "sd3.bin", {"image_proj": {**latents, "norm_out_big.weight": torch.zeros(2)}, "ip_adapter": {}})
    put(shared / "list.bin", {"a": 1})
    (shared / "page.bin").write_bytes(b"<html>")
    (shared / "page.safetensors").write_bytes(b"<html>")
    (shared / "empty.bin").touch()
    (shared / "notes.txt").write_text("not offered")
    assert folders.adapter_names() == ["own.bin", "ip-adapter-plus_sd15.bin", "sd3.bin"]
    assert folders.adapter_path("ip-adapter-plus_sd15.bin") == str(shared / "ip-adapter-plus_sd15.bin")
    assert load_model.LoadModel.validate_inputs(adapter_name="ip-adapter-plus_sd15.bin") is True


def test_our_own_folder_comes_first(models: Path) -> None:
    for folder in ("ipadapter", "ipadapter_instruct"):
        put(models / folder / "a.bin", {"image_proj": {"latents": torch.zeros(1, 2, 3)}, "ip_adapter": {}})
    assert folders.adapter_names() == ["a.bin"]
    assert folders.adapter_path("a.bin") == str(models / "ipadapter_instruct" / "a.bin")


def test_names_do_not_lead_out_of_the_folder(models: Path) -> None:
    put(models / "secret.bin", {})
    for name in ("../secret.bin", str(models / "secret.bin")):
        with pytest.raises(ValueError, match="There is no file"):
            folders.adapter_path(name)


def test_any_order_of_folders_in_a_subfolder(models: Path) -> None:
    (models / "ipadapter_instruct" / "sd15").mkdir()
    put(models / "ipadapter_instruct" / "sd15" / "a.bin", {})
    (name,) = folders.adapter_names()
    assert folders.adapter_path(name) == str(models / "ipadapter_instruct" / "sd15" / "a.bin")


@pytest.mark.parametrize("name", ["a.SAFETENSORS", "a.Sft", "a.Bin", "a.PT"])
def test_endings_in_capitals_lead_to_the_file(models: Path, name: str) -> None:
    weights = {"image_proj.latents": torch.zeros(1, 2, 3)}
    for folder in ("ipadapter_instruct", "ipadapter"):
        if name.lower().endswith((".safetensors", ".sft")):
            save_file(weights, models / folder / name)
        else:
            torch.save({"image_proj": {"latents": torch.zeros(1, 2, 3)}, "ip_adapter": {}}, models / folder / name)
    shared = (models / "ipadapter" / name).rename(models / "ipadapter" / f"shared-{name}")
    folder_paths.filename_list_cache.clear()
    assert folders.adapter_names() == [name, shared.name]
    assert folders.adapter_path(name) == str(models / "ipadapter_instruct" / name)
    assert folders.adapter_path(shared.name) == str(shared)
    assert name in folders.open_clip_names()
    assert folders.open_clip_path(name) == str(models / "ipadapter_instruct" / name)


@pytest.mark.parametrize("name", ["sd15\\old\\a.bin", "sd15/old/a.bin", "sd15\\old/a.bin"])
@pytest.mark.parametrize("separator", ["/", "\\"])
def test_a_path_saved_on_the_other_system_leads_to_the_file(
    models: Path, monkeypatch: pytest.MonkeyPatch, name: str, separator: str
) -> None:
    path = models / "ipadapter_instruct" / "sd15" / "old" / "a.bin"
    path.parent.mkdir(parents=True)
    put(path, {})
    listed = f"sd15{separator}old{separator}a.bin"  # as this system, or Windows, would list it
    monkeypatch.setattr(folder_paths, "get_filename_list", lambda folder: [listed] * (folder == "ipadapter_instruct"))
    monkeypatch.setattr(folder_paths, "get_full_path", lambda *place: str(path) if place[1] == listed else None)
    assert load_model.LoadModel.validate_inputs(adapter_name=name) is True
    assert folders.adapter_path(name) == str(path)
    assert load_open_clip.LoadOpenClip.validate_inputs(model_name=name) is True


@pytest.mark.parametrize("name", ["..\\secret.bin", "sd15\\..\\..\\secret.bin", "sd15/../../secret.bin"])
def test_no_backslash_leads_out_of_the_folder(models: Path, name: str) -> None:
    put(models / "secret.bin", {})
    with pytest.raises(ValueError, match="There is no file"):
        folders.adapter_path(name)


def test_an_adapter_in_torchs_older_format_is_offered_as_it_loads(models: Path) -> None:
    """Of the shared folder, where files are looked into."""
    weights = torch.load(make_tiny_models(models / "tiny") / "ipadapter_instruct" / MIN_ADAPTER, weights_only=True)
    torch.save(weights, models / "ipadapter" / "old.bin", _use_new_zipfile_serialization=False)
    torch.save({"a": torch.zeros(2)}, models / "ipadapter" / "other.bin", _use_new_zipfile_serialization=False)
    folder_paths.filename_list_cache.clear()
    assert folders.adapter_names() == ["old.bin"]
    assert memory.load_adapter(folders.adapter_path("old.bin"), "old.bin").config.token_count == 16


# CLIP vision: the host's own classes, with fewer layers.


def small_tower(tmp_path: Path, config_name: str, **changes: Any) -> Any:
    config = json.loads((HOST_COMFY / config_name).read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config, "num_hidden_layers": 2, **changes}))
    tower = comfy.clip_vision.ClipVisionModel(str(path))
    generator = torch.Generator().manual_seed(0)
    for parameter in tower.model.parameters():  # the host leaves them as memory happens to be
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    return tower


@pytest.mark.parametrize(
    "config_name, width",
    [
        ("clip_vision_config_vitl.json", 1024),
        ("clip_vision_config_vitl_336.json", 1024),
        ("clip_vision_config_g.json", 1664),
        ("clip_vision_siglip_384.json", 1152),
        ("clip_vision_siglip_512.json", 1152),
        ("image_encoders/dino2_large.json", 1024),
    ],
)
def test_the_wrong_clip_vision_is_named(tmp_path: Path, config_name: str, width: int) -> None:
    with torch.inference_mode(), pytest.raises(ValueError) as caught:
        vision.image_tokens(small_tower(tmp_path, config_name), torch.rand(1, 30, 40, 3), CONFIG)
    message = sentence(caught)
    assert f"this CLIP vision model is {width} wide" in message and "1280 wide" in message
    assert "connect CLIP-ViT-H-14-laion2B-s32B-b79K to clip_vision" in message


def test_no_clip_vision_at_all() -> None:
    with pytest.raises(ValueError, match="No CLIP vision is connected .* connect Load CLIP Vision"):
        vision.image_tokens(None, torch.rand(1, 30, 40, 3), CONFIG)


@pytest.fixture
def vit_h(tmp_path: Path) -> Any:
    return small_tower(tmp_path, "clip_vision_config_h.json")


@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (4000, 1), (33, 65), (224, 224)])
def test_pictures_of_any_kind_give_tokens(vit_h: Any, shape: tuple[int, int]) -> None:
    rgba = torch.rand(2, *shape, 4, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        colour, nothing = vision.image_tokens(vit_h, rgba, CONFIG)
        opaque, _ = vision.image_tokens(vit_h, rgba[..., :3], CONFIG)
        grey, _ = vision.image_tokens(vit_h, rgba[..., :1], CONFIG)
        repeated, _ = vision.image_tokens(vit_h, rgba[..., :1].repeat(1, 1, 1, 3), CONFIG)
    assert colour.shape == grey.shape == (2, 257, 1280) and nothing.shape == (1, 257, 1280)
    assert all(torch.isfinite(tokens).all() for tokens in (colour, grey, nothing))
    assert torch.equal(colour, opaque) and torch.equal(grey, repeated)


def with_one(value: float) -> torch.Tensor:
    image = torch.rand(2, 30, 40, 3)
    image[1, 15, 20, 1] = value
    return image


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_of_what_is_no_number_are_told(vit_h: Any, value: float, channels: int) -> None:
    image = with_one(value)[..., [1, 0, 2, 1][:channels]]
    with pytest.raises(ValueError) as caught:
        vision.image_tokens(vit_h, image, CONFIG)
    assert "not numbers" in sentence(caught) and "VAE in float32" in sentence(caught)


def test_only_what_is_read_of_a_picture_is_judged(vit_h: Any) -> None:
    """Neither alpha, nor what is cut off a very wide picture; and values beyond 0-1 are cut, as the host cuts them."""
    image = torch.rand(1, 4, 40, 4)
    image[..., 3], image[:, :, 0] = float("nan"), float("nan")
    image[0, 2, 20, 0] = 1e38
    with torch.inference_mode():
        tokens, _ = vision.image_tokens(vit_h, image, CONFIG)
    assert torch.isfinite(tokens).all()


@pytest.mark.parametrize(
    "shape, words",
    [
        ((0, 30, 40, 3), "holds no picture"),
        ((1, 0, 40, 3), "holds no picture"),
        ((1, 30, 40, 0), "holds no picture"),
        ((1, 30, 40, 2), "of shape [1, 30, 40, 2]"),
        ((30, 40, 3), "of shape [30, 40, 3]"),
        ((30, 40), "of shape [30, 40]"),
        ((1, 1, 30, 40, 3), "of shape [1, 1, 30, 40, 3]"),
    ],
)
def test_what_is_no_batch_of_pictures_is_told(vit_h: Any, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        vision.image_tokens(vit_h, torch.zeros(shape), CONFIG)
    assert words in sentence(caught) and "; connect" in sentence(caught)


# Many pictures.


def test_many_pictures_are_encoded_few_at_a_time_as_each_alone(vit_h: Any) -> None:
    image = torch.rand(21, 30, 40, 3, generator=torch.Generator().manual_seed(0))
    sizes: list[int] = []
    vit_h.model.register_forward_pre_hook(
        lambda module, args, inputs: sizes.append(len(inputs["pixel_values"])), with_kwargs=True
    )
    with torch.inference_mode():
        many, _ = vision.image_tokens(vit_h, image, CONFIG)
        each = [vision.image_tokens(vit_h, picture[None], CONFIG)[0] for picture in image[[0, 8, 20]]]
    assert sum(sizes[:-3]) == 1 + 21 and max(sizes) <= 8
    torch.testing.assert_close(many[[0, 8, 20]], torch.cat(each), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("combine", ["concatenate", "average", "one for each batch item"])
def test_many_pictures_are_projected_few_at_a_time_as_each_alone(tmp_path: Path, combine: str) -> None:
    adapter = memory.load_adapter(str(make_tiny_models(tmp_path) / "ipadapter_instruct" / MIN_ADAPTER), MIN_ADAPTER)
    generator = torch.Generator().manual_seed(0)
    pictures, nothing = (torch.randn(count, 7, 1280, generator=generator) for count in (21, 1))
    texts = [torch.randn(1, 77, 768, generator=generator) for _ in range(2)]
    rows = {row: tuple(texts) for row in references.Row}
    instruction = encode_instruction.EncodedInstruction(None, "", adapter.config, rows)
    sizes: list[int] = []
    adapter.adapter.image_proj.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    with torch.inference_mode():
        made = references._project_rows(adapter, instruction, pictures, nothing, combine)[references.Row.FULL]
        assert max(sizes) <= 8
        source = pictures.mean(dim=0, keepdim=True) if combine == "average" else pictures
        each = torch.cat([adapter.adapter.image_proj(picture[None], *texts) for picture in source])
    assert made.shape == ((1, 21 * 16, 768) if combine == "concatenate" else (len(source), 16, 768))
    torch.testing.assert_close(made.reshape(each.shape), each, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("height, width", [(1, 1), (3, 5), (223, 225), (224, 224), (301, 97), (480, 640), (1023, 769)])
def test_preprocessing_is_the_hosts(height: int, width: int) -> None:
    image = torch.rand(2, height, width, 3, generator=torch.Generator().manual_seed(0))
    expected = comfy.clip_vision.clip_preprocess(image)
    assert float((preprocess(image.movedim(-1, 1)) - expected).abs().max()) < 1e-6


# Settings that are no numbers.

SETTINGS = {
    "weight": 1.0,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "instruct_scale": 2.0,
    "image_scale": 1.0,
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_apply_that_is_no_number_is_told(name: str, value: float) -> None:
    inputs = dict.fromkeys(("model", "adapter", "instruction", "clip_vision", "image"))
    with pytest.raises(ValueError) as caught:
        apply.ApplyAdapter.execute(
            **inputs, **{**SETTINGS, name: value}, guidance="auto", combine_images="concatenate", mask=None
        )
    assert f"{name} is {value}" in sentence(caught) and "type a number" in sentence(caught)


@pytest.mark.parametrize("name", ["cfg", "instruct_scale", "image_scale"])
def test_a_scale_of_the_guider_that_is_no_number_is_told(name: str) -> None:
    scales = {"cfg": 5.0, "instruct_scale": 2.0, "image_scale": 1.0, name: float("nan")}
    with pytest.raises(ValueError) as caught:
        guider.Guider.execute(None, [], [], **scales)
    assert f"{name} is nan" in sentence(caught)


# CLIP: the towers that other families hold.


@pytest.mark.parametrize("held", ["clip_g", "none of SD3's", "SD2's"])
def test_a_clip_without_clip_l_is_named(held: str) -> None:
    if held == "clip_g":
        stage = comfy.sdxl_clip.SDXLRefinerClipModel(device="meta")
    elif held == "SD2's":
        sd2 = importlib.import_module("comfy.text_encoders.sd2_clip")
        stage = sd2.SD2ClipModel(device="meta")
    else:
        sd3 = importlib.import_module("comfy.text_encoders.sd3_clip")
        stage = sd3.SD3ClipModel(clip_l=False, clip_g=True, t5=False, device="meta")
    with pytest.raises(ValueError) as caught:
        text.encode_text(SimpleNamespace(cond_stage_model=stage), "use the style", CONFIG, literal=True)
    message = sentence(caught)
    assert "reads CLIP-L, which the connected CLIP does not hold" in message and "SD1.5, SDXL or SD3" in message


SMALL_OPEN_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def open_clip() -> Any:
    torch.manual_seed(0)
    model = core_encoders.OpenClip(SMALL_OPEN_CLIP).requires_grad_(False).eval()
    return memory.HostedOpenClip("small.safetensors", model, memory._patcher(model))


def test_open_clip_where_clip_l_is_wanted(open_clip: Any) -> None:
    with pytest.raises(ValueError) as caught:
        text.encode_text(open_clip, "use the style", CONFIG, literal=True)
    assert "reads CLIP-L, not small.safetensors" in sentence(caught)


def test_open_clip_in_another_node_says_where_it_belongs(open_clip: Any) -> None:
    """The page lets it connect to every CLIP."""
    assert not hasattr(open_clip, "tokenize")
    with pytest.raises(AttributeError) as caught:
        host_nodes.CLIPTextEncode().encode(open_clip, "a cat")
    assert "only Encode Instruction and Apply IPAdapter-Instruct can read" in sentence(caught)
    with pytest.raises(AttributeError, match="Load CLIP Vision"):
        host_nodes.CLIPVisionEncode().encode(open_clip, torch.rand(1, 30, 40, 3), "center")


def test_clip_l_where_open_clip_is_wanted(open_clip: Any) -> None:
    config = core_config.AdapterConfig(
        instruction_width=1024, instruction_encoder=core_config.InstructionEncoder.OPEN_CLIP
    )
    with pytest.raises(ValueError) as caught:
        text.encode_text(SimpleNamespace(cond_stage_model=None), "use the style", config, literal=True)
    assert "connect Load OpenCLIP Model" in sentence(caught)
    with pytest.raises(ValueError) as caught:
        text.encode_text(open_clip, "use the style", config, literal=True)
    assert "1024 wide" in sentence(caught) and "small.safetensors is 16 wide" in sentence(caught)


def test_an_open_clip_image_tower_of_another_width(open_clip: Any) -> None:
    with pytest.raises(ValueError) as caught:
        vision.image_tokens(open_clip, torch.rand(1, 30, 40, 3), CONFIG)
    assert "small.safetensors is 32 wide" in sentence(caught)


def test_open_clip_reads_pictures_and_wordings_under_the_hosts_memory_manager(open_clip: Any) -> None:
    config = core_config.AdapterConfig(
        image_width=32, instruction_width=16, instruction_encoder=core_config.InstructionEncoder.OPEN_CLIP
    )
    with torch.inference_mode():
        pictures, nothing = vision.image_tokens(open_clip, torch.rand(2, 30, 40, 3), config)
        wording = text.encode_text(open_clip, "use the style", config, literal=True)
        expected = open_clip.model.image_tokens(torch.zeros(1, 3, 28, 28))
    assert pictures.shape == (2, 5, 32) and wording.shape == (1, 77, 16)
    torch.testing.assert_close(nothing, expected)
    assert not torch.allclose(pictures[:1], nothing)


def test_a_long_wording_is_cut_by_open_clip_with_a_warning(open_clip: Any, caplog: pytest.LogCaptureFixture) -> None:
    config = core_config.AdapterConfig(
        instruction_width=16, instruction_encoder=core_config.InstructionEncoder.OPEN_CLIP
    )
    words = ["style"] * 75 + ["umbrella", "teapot"]
    with torch.inference_mode():
        long = text.encode_text(open_clip, " ".join(words), config, literal=True)
        assert "77 tokens" in caplog.text and "'umbrella teapot'" in caplog.text
        caplog.clear()
        fitting = text.encode_text(open_clip, " ".join(words[:75]), config, literal=True)
        assert not caplog.text and torch.equal(long, fitting)
        with caplog.at_level("INFO"):
            text.encode_text(open_clip, " ".join(words), config, literal=False)
    assert "A prompt is longer" in caplog.text and "wording" not in caplog.text


# Models of other families.


def test_a_model_without_cross_attentions_is_named(tmp_path: Path) -> None:
    """Flux, from the host's own classes: its blocks attend to text and picture at once."""
    unet = {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": 8,
        "context_in_dim": 8,
        "hidden_size": 16,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [4, 2, 2],
        "theta": 100,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": False,
    }
    needed = [field.name for field in fields(FluxParams) if field.default is MISSING]  # newer hosts name more
    unet = dict.fromkeys(set(needed) - set(unet), []) | unet
    cpu = torch.device("cpu")
    flux = comfy.model_base.Flux(comfy.supported_models.Flux(dict(unet)), device=cpu)
    patcher = comfy.model_patcher.ModelPatcher(flux, load_device=cpu, offload_device=cpu)
    adapters = make_tiny_models(tmp_path) / "ipadapter_instruct"
    for name, family in ((MIN_ADAPTER, "SD1.5"), ("ip-adapter-instruct-sd3.bin", "SD3")):
        adapter = memory.load_adapter(str(adapters / name), "mine.bin")
        with pytest.raises(ValueError) as caught:
            host_apply.matching_sites(patcher, adapter)
        message = sentence(caught)
        assert f"mine.bin is an adapter for {family} (" in message and "Flux" in message and "same family" in message
