"""The pages on training say what the code says: messages, configs, sizes and tables."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

import pytest
import tomllib
import torch
from ipadapter_instruct_core.config import Base
from training.features.draws import Dropout, Dropped
from training.train.adapter import Projector
from training.train.loop import accumulation
from training.train.settings import FREE_SETTINGS, TrainConfig, Validation

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "training" / "README.md").read_text()
SOURCES = (ROOT / "training" / "SOURCES.md").read_text(encoding="utf-8")
CLUSTER = (ROOT / "training" / "CLUSTER.md").read_text()


def rows_of(text: str, heading: str) -> list[list[str]]:
    """The cells of the tables below a heading, without their heads."""
    part = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = part.splitlines()
    tables = [line for n, line in enumerate(lines) if line.startswith("|") and not _is_head(lines, n)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in tables]


def _is_head(lines: list[str], n: int) -> bool:
    return lines[n].startswith("|---") or (n + 1 < len(lines) and lines[n + 1].startswith("|---"))


def said_by_the_code() -> list[str]:
    """Every string of training and the core, with … for what is filled in."""
    found = []
    for folder in ("training", "ipadapter_instruct_core"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(re.sub(r"%[srd]", "…", node.value))
    return found


SAID = said_by_the_code()
# A quoted message may itself quote a word by backticks, so it reaches to the last one of its cell.
QUOTES = [row[0][1:-1] for row in rows_of(PAGE, "When something goes wrong")]


@pytest.mark.parametrize("quote", QUOTES)
def test_a_quoted_message_is_one_that_the_code_gives(quote: str) -> None:
    assert len(quote.replace("…", "").strip()) > 12, "it would fit anything"
    pieces = [re.escape(piece.strip()) for piece in quote.split("…") if piece.strip()]
    pattern = re.compile(".*".join(pieces), re.DOTALL)
    assert any(pattern.search(text) for text in SAID)


def test_the_pages_name_every_config_and_no_other() -> None:
    there = {f"{path.parent.name}/{path.name}" for path in (ROOT / "training" / "configs").rglob("*.toml")}
    named = set(re.findall(r"(\w+/\w+\.toml)", PAGE + CLUSTER))
    assert named <= there
    assert there - named == {"build/own.toml"} - named


def test_the_table_of_runs_has_the_configs_numbers() -> None:
    for cells in rows_of(PAGE, "The paper's runs"):
        for name in re.findall(r"`(train/\w+)\.toml`", cells[0]):
            settings = tomllib.loads((ROOT / "training" / "configs" / f"{name}.toml").read_text())
            if cells[1]:
                batch, rate, steps = (float(number) for number in cells[1].replace(",000", "000").split(", "))
                assert (batch, rate, steps) == (settings["batch_size"], settings["learning_rate"], settings["steps"])


def test_the_sources_have_the_configs_counts() -> None:
    counts = [cells for cells in rows_of(PAGE, "What you need") if len(cells) == 5]
    total = 0
    for cells in counts:
        settings = tomllib.loads((ROOT / "training" / "configs" / cells[3].strip("`")).read_text())
        assert int(cells[2].replace(",", "")) == settings["limit"]
        total += settings["limit"]
    assert len(counts) == 5 and f"**{total:,} samples**" in PAGE


def test_sizes_follow_from_their_shapes() -> None:
    products = re.findall(r"((?:\d+ × )+\d+) B = ([\d,]+) (M?B)", PAGE)
    assert len(products) >= 9
    for product, size, unit in products:
        exact = math.prod(int(factor) for factor in product.split(" × "))
        told = int(size.replace(",", ""))
        assert told == (round(exact / 1e6) if unit == "MB" else exact), product
    table = [cells for cells in rows_of(PAGE, "What you need") if len(cells) == 3]
    for column in (1, 2):
        parts = [cells[column] for cells in table if not cells[0].startswith("**")]
        together, total = (cells[column] for cells in table if cells[0].startswith("**"))
        sizes = [int(part.split(" = ")[1].removesuffix(" B").replace(",", "")) for part in parts if " = " in part]
        assert together == f"{sum(sizes):,} B" and total == f"{round(sum(sizes) * 177_000 / 1e9)} GB"


def test_checkpoints_are_as_large_as_told() -> None:
    from dataclasses import replace

    import torch
    from ipadapter_instruct_core.adapter import Adapter
    from training.train.adapter import SCRATCH

    widths = {  # of the cross-attentions, down, up, middle
        Base.SD15: [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280],
        Base.SDXL: [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10,
    }
    counts = {}
    for base, layers in widths.items():
        config = replace(SCRATCH[base], instruction_width=1024, prompt_width=None, layers=tuple(enumerate(layers)))
        with torch.device("meta"):
            counts[base] = sum(parameter.numel() for parameter in Adapter(config).parameters())
    assert f"({counts[Base.SD15] / 1e6:.1f} million weights), {counts[Base.SDXL] * 12 / 1e9:.1f} GB for SDXL" in PAGE
    assert (
        f"{counts[Base.SD15] * 12 / 1e6:.0f} MB for SD1.5" in PAGE
        and f"({counts[Base.SDXL] / 1e6:.0f} million)" in PAGE
    )
    assert (
        f"{counts[Base.SD15] / 1e6:.0f} million weights on SD1.5 and {counts[Base.SDXL] / 1e6:.0f} million" in CLUSTER
    )


def test_the_dropout_table_is_what_is_drawn() -> None:
    rows = rows_of(PAGE, "What dropout trains")
    setting = {Dropped.NOTHING: "(the rest)"} | {kind: f"`{kind.value}`" for kind in list(Dropped)[1:]}
    assert sorted(cells[1] for cells in rows) == sorted(setting.values())
    assert {kind.value for kind in list(Dropped)[1:]} == set(Dropout.model_fields)
    for cells in rows:
        kind = next(kind for kind, name in setting.items() if name == cells[1])
        assert (cells[2] == "kept") == kind.keeps_text and (cells[3] == "kept") == kind.keeps_image
        assert cells[4].startswith("kept") == kind.keeps_instruction == (cells[5] == "kept")
    assert all(value == 0.05 for value in Dropout().model_dump().values()) and "0.05 each" in PAGE


def test_the_projectors_are_all_told() -> None:
    told = [cells[0].strip("`") for cells in rows_of(PAGE, "Projectors")]
    assert told == list(Projector.__args__)


def test_settings_that_may_change_are_such() -> None:
    told = re.search(r"what does not \((.*?), …\)", PAGE)
    assert set(re.findall(r"`(\w+)`", told[1])) <= FREE_SETTINGS


def test_batches_are_cut_as_told() -> None:
    rows = rows_of(CLUSTER, "How the batch is cut")
    assert len(rows) >= 5
    for batch, processes, micro, steps in (map(int, row) for row in rows):
        config = TrainConfig(base="b", out="o", features="f", batch_size=batch, micro_batch_size=micro)
        assert accumulation(config, processes) == steps


def test_every_option_that_the_pages_name_exists() -> None:
    from dataclasses import fields

    from training.datasets.build import BuildConfig
    from training.datasets.endpoint import Endpoint
    from training.datasets.sources.own import Own
    from training.evaluate.evaluate import EvaluateConfig
    from training.features.encode import EncodeConfig
    from training.instructions.extend import InstructionsConfig
    from training.miniature.expand import write
    from training.miniature.judged import evaluate as judged
    from training.miniature.world import samples
    from training.train.export import ExportConfig

    kinds = (BuildConfig, EncodeConfig, TrainConfig, ExportConfig, EvaluateConfig, InstructionsConfig)
    known = {name.replace("_", "-") for kind in kinds for name in kind.model_fields}
    known |= {f"source.{name}" for name in Own.model_fields} | {
        f"endpoint.{name.replace('_', '-')}" for name in Endpoint.model_fields
    }
    known |= {f"validation.{name}" for name in Validation.model_fields}
    miniature = (samples.BuildConfig, write.ExpandConfig, judged.EvaluateConfig)
    known |= {field.name for kind in miniature for field in fields(kind)}
    known |= {"help", "logdir"}  # of every verb, of TensorBoard
    named = set(re.findall(r"--([a-z][\w.-]*)", PAGE)) - {"fsdp_version"}
    assert named <= known, named - known


def test_the_bytes_that_encode_writes_are_those_of_the_page(tmp_path: Path) -> None:
    """A shard of samples of SD1.5's shapes, as `encode` writes them."""
    from ipadapter_instruct_core.tasks import Task
    from safetensors.torch import save
    from training.datasets.sample import Sample
    from training.datasets.shards import write_shard

    latents = {name: torch.zeros(4, 64, 64) for name in ("latent_mean", "latent_deviation")}
    states = {"image": torch.zeros(257, 1280, dtype=torch.half), "text": torch.zeros(77, 768, dtype=torch.half)}
    sample = Sample(b"", None, "a boat at dawn " * 6, Task.STYLE, "./000/picture.jpg", "group", "", "a harbour " * 6)
    files = {"json": sample.members()["json"], "safetensors": save(latents | states)}
    write_shard(tmp_path / "shard.tar", ((f"train-00000-{number:05d}", files) for number in range(50)))
    told = int(re.search(r"`encode` writes ([\d,]+) bytes a sample", SOURCES)[1].replace(",", ""))
    assert abs((tmp_path / "shard.tar").stat().st_size / 50 - told) < 500
    assert f"{42_000 * told / 1e9:.0f} GB for 42,000, {177_000 * told / 1e9:.0f} GB for all 177,000" in SOURCES
