"""What is trained on SD3 and SD3.5 is what runs: as test_training_skew.py, on tiny ones and their diffusers twins."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench import Row, random
from PIL import Image, ImageOps
from reference_vectors import relative_error
from through import PROMPT, Through

sys.path.append(str(Path(__file__).parents[1] / "training" / "helpers"))  # diffusers_twin.py, tiny_base.py

from diffusers_twin import save_sd3_twin, save_sd35_twin  # noqa: E402
from ipadapter_instruct_core.adapter import Adapter  # noqa: E402
from ipadapter_instruct_core.checkpoint import save  # noqa: E402
from ipadapter_instruct_core.config import Base  # noqa: E402
from ipadapter_instruct_core.guidance import combine  # noqa: E402
from ipadapter_instruct_core.tasks import GuidanceMode, Task  # noqa: E402
from tiny_base import OPEN_CLIP, save_open_clip  # noqa: E402
from training.frozen.encoders import EncoderPaths, load_encoders  # noqa: E402
from training.frozen.network import predict, prepare  # noqa: E402
from training.train.adapter import SCRATCH  # noqa: E402

TOKENS, TRANSFORMER = 1e-4, 5e-4  # the tolerances of SD1.5's test
SIGMA = 0.7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from skimage import data

    made = tmp_path_factory.mktemp("twin")
    save_sd35_twin(made / "sd35", save_sd3_twin(made / "sd3", seed=13), seed=13)
    save_open_clip(made / "clip")
    ImageOps.exif_transpose(Image.fromarray(data.coffee())).resize((301, 200)).save(made / "photo.png")
    return made


@pytest.fixture(
    scope="module",
    params=[("sd3", Task.STYLE), ("sd3", Task.COMPOSITION), ("sd35", Task.COMPOSITION)],
    ids=lambda param: f"{param[0]}-{param[1].value}",
)
def through(request: pytest.FixtureRequest, folder: Path) -> Through:
    name, task = request.param
    bench = request.getfixturevalue(f"{name}_bench")
    encoders = load_encoders(EncoderPaths(base=folder / name, image_encoder=folder / "clip"), with_network=True)
    config = replace(
        SCRATCH[Base(name)],
        image_width=OPEN_CLIP["vision_cfg"]["width"],
        width=128,
        heads=2,
        depth=2,
        layers=tuple(prepare(encoders.base.network)),
    )
    adapter = Adapter(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
        save(folder / f"{name}.safetensors", adapter)
        words = {Task.STYLE: "use the style", Task.COMPOSITION: "use the composition"}[task]
        return Through(bench, folder, encoders, folder / f"{name}.safetensors", task, words)


@torch.no_grad()
def test_tokens_keys_values_and_text_agree(through: Through) -> None:
    three_way = through.task is Task.COMPOSITION
    assert through.settings.guidance is (GuidanceMode.THREE_WAY if three_way else GuidanceMode.SIMPLE)
    patcher = through.applied.adapter.patcher.model
    normed = through.encoders.base.kind is Base.SD35
    embedder = torch.nn.Identity() if normed else through.bench.model.model.diffusion_model.context_embedder
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
                base.network, x, torch.tensor([1000 * SIGMA]), each.text, each.image if with_adapter else None,
                base.added(each.pooled, 64, torch.float32),
            )
            for row, each in through.conditions.items()
        }  # fmt: skip
        return combine(rows, coefficients)

    assert relative_error(host, combined(with_adapter=True)) < TRANSFORMER
    assert relative_error(combined(with_adapter=False), combined(with_adapter=True)) > 10 * TRANSFORMER
