"""What is trained is what runs: one set of weights and one picture file, through training and through the nodes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import comfy.clip_vision
import inside
import numpy as np
import pytest
import torch
from bench import Bench, Row, host_memory, random
from PIL import Image, ImageOps
from reference_vectors import relative_error
from through import PROMPT, Through, loaded_picture
from tools.tiny.models import TINY_NAMES
from tools.tiny.shapes import FULL_UNET

sys.path.append(str(Path(__file__).parents[1] / "training" / "helpers"))  # diffusers_twin.py, tiny_base.py

from diffusers_twin import save_twin  # noqa: E402
from ipadapter_instruct_core.adapter import Adapter  # noqa: E402
from ipadapter_instruct_core.checkpoint import save  # noqa: E402
from ipadapter_instruct_core.config import AdapterConfig, InstructionEncoder  # noqa: E402
from ipadapter_instruct_core.tasks import GuidanceMode, Task  # noqa: E402
from tiny_base import OPEN_CLIP, save_open_clip  # noqa: E402
from training.datasets.sample import decode_picture  # noqa: E402
from training.frozen.encoders import EncoderPaths, Encoders, HuggingFaceImageTower, load_encoders, picture_tensor  # noqa: E402
from training.frozen.unet import cross_attentions, predict, prepare_unet  # noqa: E402

TOKENS, UNET = 1e-4, 5e-4
SIGMA = 3.0
vision = importlib.import_module(f"{inside.PACK}.nodes.host.vision")


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SD1.5 of the host's tests, its sixteen cross-attentions, for diffusers; an OpenCLIP; a photograph."""
    from skimage import data

    folder = tmp_path_factory.mktemp("twin")
    save_twin(folder / "base", FULL_UNET, seed=1)
    save_open_clip(folder / "clip")
    ImageOps.exif_transpose(Image.fromarray(data.coffee())).resize((301, 200)).save(folder / "photo.png")
    return folder


@pytest.fixture(scope="module", params=["paper, OpenCLIP", "released, CLIP-L"])
def encoders(request: pytest.FixtureRequest, twin: Path) -> Encoders:
    """Training's own; the paper's projector reads OpenCLIP instructions, the released one CLIP-L and the prompt."""
    instruction = str(twin / "clip") if request.param.startswith("paper") else "clip-l"
    paths = EncoderPaths(base=twin / "base", image_encoder=twin / "clip", instruction_encoder=instruction)
    loaded = load_encoders(paths, with_network=True)
    prepare_unet(loaded.base.network)
    return loaded


@pytest.fixture(scope="module")
def adapter_file(encoders: Encoders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    paper = encoders.instruction_encoder is InstructionEncoder.OPEN_CLIP
    config = AdapterConfig(
        image_width=OPEN_CLIP["vision_cfg"]["width"],
        width=128,
        heads=2,
        depth=2,
        instruction_width=OPEN_CLIP["text_cfg"]["width"] if paper else 768,
        prompt_width=None if paper else 768,
        instruction_encoder=encoders.instruction_encoder,
        layers=tuple(cross_attentions(encoders.base.network)),
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    save(path, Adapter(config))
    return path


@pytest.fixture(params=[Task.STYLE, Task.OBJECT], ids=lambda task: task.value)
def through(
    request: pytest.FixtureRequest, full_bench: Bench, twin: Path, encoders: Encoders, adapter_file: Path
) -> Through:
    words = {Task.STYLE: "use the style", Task.OBJECT: "use the cup"}[request.param]
    return Through(full_bench, twin, encoders, adapter_file, request.param, words)


def test_adapter_tokens_keys_and_values_agree(through: Through) -> None:
    picture = vision.image_tokens(through.clip_vision, through.picture, through.applied.adapter.config)[0]
    assert relative_error(picture, through.features["image"]) < TOKENS
    assert through.settings.guidance is (GuidanceMode.SIMPLE if through.task is Task.STYLE else GuidanceMode.THREE_WAY)
    for row, condition in through.conditions.items():
        host_row = Row(row.value)
        tokens = through.applied.tokens[host_row]
        host = through.applied.adapter.patcher.model.key_values(tokens)
        strength = through.applied.weight
        for (keys, values), (host_keys, host_values) in zip(condition.image, host, strict=True):
            assert relative_error(host_keys, keys) < TOKENS, row
            assert relative_error(host_values * strength, values) < TOKENS


def test_the_whole_unet_agrees(through: Through) -> None:
    """One evaluation of a guider in the host against the rows of training, combined."""
    from training.frozen.sampling import combine

    x = random(1, 4, 8, 8)
    cfg = through.settings.text_scale
    denoised = through.bench.cfg(
        through.model, cfg, positive=through.bench.text(PROMPT),
        negative=through.bench.empty, x=x, sigma=SIGMA,
    )  # fmt: skip
    noisy = x * (1 + SIGMA**2) ** 0.5
    host = (noisy - denoised) / SIGMA
    sampling = through.bench.model.model.model_sampling
    timestep = sampling.timestep(torch.tensor([SIGMA])).float()
    rows = {
        row: predict(through.encoders.base.network, x, timestep, condition.text, condition.image)
        for row, condition in through.conditions.items()
    }
    own = combine(rows, through.settings.coefficients())
    assert relative_error(host, own) < UNET
    bare = {
        row: predict(through.encoders.base.network, x, timestep, c.text, None) for row, c in through.conditions.items()
    }
    assert relative_error(combine(bare, through.settings.coefficients()), own) > 10 * UNET, "the adapter does nothing"


def test_preprocessed_picture_and_image_tokens_agree_by_the_hosts_own_clip_vision(
    twin: Path, tiny_models: Path, tmp_path: Path
) -> None:
    """The released weights' way: Load CLIP Vision in the host, a transformers folder in training."""
    path = tiny_models / "clip_vision" / TINY_NAMES["CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"]
    clip_vision = comfy.clip_vision.load(str(path))
    picture = loaded_picture(twin / "photo.png")
    seen: list[torch.Tensor] = []
    clip_vision.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"].clone()), with_kwargs=True
    )
    config = AdapterConfig(image_width=1280)
    host_tokens, host_nothing = vision.image_tokens(clip_vision, picture, config)
    tower = HuggingFaceImageTower(save_image_tower(tmp_path, path))
    pixels = tower.preprocess(picture_tensor(decode_picture((twin / "photo.png").read_bytes())))
    assert any(relative_error(one, pixels) < TOKENS for one in seen if one.abs().max() > 0)
    assert relative_error(host_tokens, tower.image_tokens(pixels)) < TOKENS
    assert relative_error(host_nothing, tower.image_tokens(torch.zeros_like(pixels))) < TOKENS


def save_image_tower(folder: Path, weights: Path) -> Path:
    """ViT-H/14's image tower as transformers keeps it."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14,
        projection_dim=1024, hidden_act="gelu",
    )  # fmt: skip
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(config)
    # The host keeps text and image towers in half precision, whatever the file's.
    state = {key: tensor.half().float() for key, tensor in torch.load(weights, weights_only=True).items()}
    known = model.state_dict()
    positions = {key: torch.arange(257)[None] for key in known if key.endswith("position_ids")}
    model.load_state_dict({**state, **positions}, assign=True, strict=True)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("words", ["use the style", "keep the face (of the person), please — now!", "word " * 100])
def test_text_tokens_agree(full_bench: Bench, twin: Path, encoders: Encoders, words: str, adapter_file: Path) -> None:
    text = importlib.import_module(f"{inside.PACK}.nodes.host.text")
    paper = encoders.instruction_tower is not None
    open_clip = host_memory.load_hosted_open_clip(str(twin / "clip" / "open_clip_model.safetensors"), "clip")
    host_config = host_memory.load_adapter(str(adapter_file), "a").config
    host = text.encode_text(open_clip if paper else full_bench.clip, words, host_config, literal=True)
    assert relative_error(host, encoders.instruction_states([words])) < TOKENS


def test_a_picture_file_is_read_alike(twin: Path) -> None:
    own = picture_tensor(decode_picture((twin / "photo.png").read_bytes()))
    assert torch.equal(loaded_picture(twin / "photo.png").movedim(-1, 1), own)
    assert np.ptp(own.numpy()) > 0.5
