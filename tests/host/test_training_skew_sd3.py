"""What is trained on SD3 is what runs: as test_training_skew.py, on the host's tiny SD3 and its diffusers twin."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from bench import Row, Sd3Bench, random
from PIL import Image, ImageOps
from reference_vectors import relative_error
from through import PROMPT, Through

sys.path.append(str(Path(__file__).parents[1] / "training" / "helpers"))  # diffusers_twin.py, tiny_base.py

from diffusers_twin import save_sd3_twin  # noqa: E402
from ipadapter_instruct_core.adapter import Adapter  # noqa: E402
from ipadapter_instruct_core.checkpoint import save  # noqa: E402
from ipadapter_instruct_core.config import AdapterConfig, Base, Form  # noqa: E402
from ipadapter_instruct_core.guidance import combine  # noqa: E402
from ipadapter_instruct_core.tasks import GuidanceMode, Task  # noqa: E402
from tiny_base import OPEN_CLIP, save_open_clip  # noqa: E402
from training.frozen.encoders import EncoderPaths, load_encoders  # noqa: E402
from training.frozen.network import predict, prepare  # noqa: E402

TOKENS, TRANSFORMER = 1e-4, 5e-4  # the tolerances of SD1.5's test
SIGMA = 0.7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from skimage import data

    made = tmp_path_factory.mktemp("twin")
    save_sd3_twin(made / "base", seed=13)
    save_open_clip(made / "clip")
    ImageOps.exif_transpose(Image.fromarray(data.coffee())).resize((301, 200)).save(made / "photo.png")
    return made


@pytest.fixture(scope="module", params=[Task.STYLE, Task.COMPOSITION], ids=lambda task: task.value)
def through(request: pytest.FixtureRequest, sd3_bench: Sd3Bench, folder: Path) -> Through:
    encoders = load_encoders(EncoderPaths(base=folder / "base", image_encoder=folder / "clip"), with_unet=True)
    config = AdapterConfig(
        image_width=OPEN_CLIP["vision_cfg"]["width"],
        width=128,
        heads=2,
        depth=2,
        output_width=4096,
        layers=tuple(prepare(encoders.base.unet)),
        base=Base.SD3,
        form=Form.JOINT,
        output_suffix="_big",
    )
    torch.manual_seed(0)
    save(folder / "adapter.safetensors", Adapter(config))
    words = {Task.STYLE: "use the style", Task.COMPOSITION: "use the composition"}[request.param]
    with torch.no_grad():
        return Through(sd3_bench, folder, encoders, folder / "adapter.safetensors", request.param, words)


@torch.no_grad()
def test_tokens_keys_values_and_text_agree(through: Through) -> None:
    three_way = through.task is Task.COMPOSITION
    assert through.settings.guidance is (GuidanceMode.THREE_WAY if three_way else GuidanceMode.SIMPLE)
    patcher = through.applied.adapter.patcher.model
    embedder = through.bench.model.model.diffusion_model.context_embedder
    for row, condition in through.conditions.items():
        host = patcher.key_values(through.applied.tokens[Row(row.value)].float(), embedder)
        for site, (host_keys, host_values) in zip(condition.image, host, strict=True):
            assert relative_error(host_keys, site.keys) < TOKENS, row
            assert relative_error(host_values, site.values) < TOKENS
            assert site.weight == through.applied.weight
    own = through.encoders.text_features([PROMPT])
    ((text, more),) = through.bench.text(PROMPT)
    assert relative_error(text[..., :768], own["text"][:, :77, :768]) < TOKENS
    assert relative_error(more["pooled_output"][:, :768], own["pooled"][:, :768]) < TOKENS


@torch.no_grad()
def test_the_whole_transformer_agrees(through: Through) -> None:
    """One evaluation of a guider in the host against the rows of training, combined."""
    x, cfg = random(1, 16, 8, 8), through.settings.text_scale
    texts = {"positive": through.bench.text(PROMPT), "negative": through.bench.empty}
    host = (x - through.bench.cfg(through.model, cfg, x=x, sigma=SIGMA, **texts)) / SIGMA
    base, coefficients = through.encoders.base, through.settings.coefficients()

    def combined(with_adapter: bool) -> torch.Tensor:
        rows = {
            row: predict(
                base.unet, x, torch.tensor([1000 * SIGMA]), each.text, each.image if with_adapter else None,
                base.added(each.pooled, 64, torch.float32),
            )
            for row, each in through.conditions.items()
        }  # fmt: skip
        return combine(rows, coefficients)

    assert relative_error(host, combined(with_adapter=True)) < TRANSFORMER
    assert relative_error(combined(with_adapter=False), combined(with_adapter=True)) > 10 * TRANSFORMER
