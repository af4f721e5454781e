"""References through the running server: encoded, saved, loaded, combined; and what a person does wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import CLEARLY, adapted, distance, failure, one
from safetensors.torch import load_file, save_file
from tools.host.graphs import Graph, node, rewired, text_to_image
from tools.host.server import ComfyError, ComfyServer
from tools.tiny.models import MIN_ADAPTER, MIN_CHECKPOINT, MIN_PAPER_ADAPTER

FOLDER = "ipadapter_instruct_references"
LOADED = {"instruction", "clip_vision", "image"}  # what a reference stands for


def plain(picture: str, **settings: Any) -> Graph:
    return adapted(text_to_image(MIN_CHECKPOINT), picture, **({"guidance": "simple"} | settings))


def with_reference(graph: Graph, source: str) -> Graph:
    apply = {key: value for key, value in graph["apply"]["inputs"].items() if key not in LOADED}
    return {**graph, "apply": node("IPAdapterInstructApply", **(apply | {"reference": [source, 0]}))}


def encoded(picture: str, **settings: Any) -> Graph:
    graph = plain(picture, **settings)
    given = {key: value for key, value in graph["apply"]["inputs"].items() if key in LOADED}
    encode = node("IPAdapterInstructEncodeReference", adapter=["adapter", 0], combine_images="concatenate", **given)
    return with_reference({**graph, "encoded": encode}, "encoded")


def saved(picture: str, prefix: str) -> Graph:
    save = node("IPAdapterInstructSaveReference", reference=["encoded", 0], filename_prefix=prefix)
    return {**encoded(picture), "keep": save}


def loaded(name: str, adapter: str = MIN_ADAPTER) -> Graph:
    """Without the picture, CLIP vision, and the instruction."""
    graph = with_reference(plain("", adapter=adapter), "loaded")
    graph["loaded"] = node("IPAdapterInstructLoadReference", reference_name=name)
    return {key: value for key, value in graph.items() if key not in ("instruction", "vision", "reference")}


@pytest.fixture(scope="module")
def direct(server: ComfyServer, reference_picture: str) -> np.ndarray:
    return one(server, plain(reference_picture))


@pytest.fixture(scope="module")
def kept(server: ComfyServer, reference_picture: str) -> Iterator[Path]:
    """The file of a reference that the server has saved."""
    server.run(saved(reference_picture, "styles/oil"))
    yield server.models / FOLDER / "styles" / "oil_00001.safetensors"


def test_an_encoded_reference_gives_the_same_picture(server: ComfyServer, reference_picture: str, direct: Any) -> None:
    np.testing.assert_array_equal(one(server, encoded(reference_picture)), direct)
    assert distance(direct, one(server, text_to_image(MIN_CHECKPOINT))) > CLEARLY


def test_a_loaded_one_too_without_clip_vision(server: ComfyServer, kept: Path, direct: np.ndarray) -> None:
    assert kept.stat().st_size < 1_000_000
    name = kept.relative_to(server.models / FOLDER)
    np.testing.assert_array_equal(one(server, loaded(str(name))), direct)
    np.testing.assert_array_equal(one(server, loaded(str(name).replace("/", "\\"))), direct)


def test_saving_again_takes_the_next_number(server: ComfyServer, reference_picture: str, kept: Path) -> None:
    graph = saved(reference_picture, "styles/oil")
    graph["instruction"]["inputs"]["task"] = "object"
    server.run(graph)
    assert sorted(path.name for path in kept.parent.iterdir())[:2] == [kept.name, "oil_00002.safetensors"]


def test_the_prompts_of_the_instruction_are_those_of_clip_text_encode(
    server: ComfyServer, reference_picture: str, direct: np.ndarray
) -> None:
    graph = plain(reference_picture)  # the same prompts in both of its places
    graph["sampler"] = rewired(graph["sampler"], positive=["instruction", 1], negative=["instruction", 2])
    del graph["positive"], graph["negative"]
    np.testing.assert_array_equal(one(server, graph), direct)


def combined(picture: str, weights: tuple[float, float], method: str) -> Graph:
    graph = encoded(picture)
    graph["other words"] = rewired(graph["instruction"], task="composition")
    graph["other"] = rewired(graph["encoded"], instruction=["other words", 0])
    graph["combined"] = node(
        "IPAdapterInstructCombineReferences",
        reference_1=["encoded", 0], weight_1=weights[0], reference_2=["other", 0], weight_2=weights[1], method=method,
    )  # fmt: skip
    return with_reference(graph, "combined")


@pytest.mark.parametrize("method", ["side by side", "mean"])
def test_combining_weighs(server: ComfyServer, reference_picture: str, direct: np.ndarray, method: str) -> None:
    np.testing.assert_array_equal(one(server, combined(reference_picture, (0.4, 0.0), method)), direct)
    assert distance(one(server, combined(reference_picture, (1.0, 3.0), method)), direct) > CLEARLY / 8


def test_a_negative_reference_and_a_curve_change_the_picture(
    server: ComfyServer, reference_picture: str, direct: np.ndarray
) -> None:
    graph = encoded(reference_picture)
    graph["words"] = rewired(graph["instruction"], task="everything")
    graph["away"] = rewired(graph["encoded"], instruction=["words", 0])
    graph["apply"]["inputs"]["negative_reference"] = ["away", 0]
    assert distance(one(server, graph), direct) > CLEARLY / 4
    assert distance(one(server, plain(reference_picture, weight_curve="ease in")), direct) > CLEARLY / 4


# What goes wrong.


def test_another_adapter_is_refused_by_name(server: ComfyServer, kept: Path) -> None:
    graph = loaded(str(kept.relative_to(server.models / FOLDER)), adapter=MIN_PAPER_ADAPTER)
    assert f"made with the adapter {MIN_ADAPTER}" in failure(server, graph, "apply")


def test_both_or_neither_is_told(server: ComfyServer, reference_picture: str, kept: Path, direct: np.ndarray) -> None:
    both = encoded(reference_picture)
    both["apply"]["inputs"]["image"] = ["reference", 0]
    assert "Both a reference and image are connected" in failure(server, both, "apply")
    # Packs that connect by themselves give CLIP vision to all that take one.
    vision = loaded(str(kept.relative_to(server.models / FOLDER)))
    vision["vision"] = plain(reference_picture)["vision"]
    vision["apply"] = rewired(vision["apply"], clip_vision=["vision", 0])
    np.testing.assert_array_equal(one(server, vision), direct)
    neither = plain(reference_picture)
    neither["apply"]["inputs"] = {k: v for k, v in neither["apply"]["inputs"].items() if k not in LOADED}
    assert "no picture to apply" in failure(server, neither, "apply")


@pytest.mark.parametrize("weights", [(0.0, 0.0)])
def test_weights_without_proportions_are_told(
    server: ComfyServer, reference_picture: str, weights: tuple[float, float]
) -> None:
    assert "gives no proportions" in failure(server, combined(reference_picture, weights, "mean"), "combined")


def test_references_of_two_adapters_are_not_combined(server: ComfyServer, reference_picture: str) -> None:
    graph = combined(reference_picture, (1.0, 1.0), "mean")
    graph["second"] = node("IPAdapterInstructModelLoader", adapter_name=MIN_PAPER_ADAPTER)
    graph["other words"] = rewired(graph["other words"], adapter=["second", 0])
    graph["other"] = rewired(graph["other"], adapter=["second", 0])
    assert f"({MIN_ADAPTER} and {MIN_PAPER_ADAPTER})" in failure(server, graph, "combined")


@pytest.mark.parametrize("prefix", ["../leak", "/etc/leak", "a/../../leak", "", "..", "a\\..\\..\\leak", "x" * 300])
def test_a_name_leads_nowhere_else(server: ComfyServer, reference_picture: str, prefix: str) -> None:
    assert "is no name for a file" in failure(server, saved(reference_picture, prefix), "keep")
    assert not list(server.base.rglob("leak*"))


def damage(path: Path, kept: Path, how: str) -> None:
    content = kept.read_bytes()
    if how == "half":
        path.write_bytes(content[: len(content) // 2])
    elif how == "NaN":
        state = load_file(kept)
        save_file(state | {"full": torch.full_like(state["full"], float("nan"))}, path, facts(kept))
    else:
        path.write_bytes({"page": b"<html>", "empty": b"", "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR."}[how])


def facts(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("how", ["half", "NaN", "page", "empty", "pickle"])
def test_a_damaged_file_is_told_and_the_host_goes_on(
    server: ComfyServer, kept: Path, direct: np.ndarray, how: str
) -> None:
    bad = server.models / FOLDER / f"bad_{how}.safetensors"
    damage(bad, kept, how)
    assert bad.name in failure(server, loaded(bad.name), "loaded")
    bad.unlink()
    with pytest.raises(ComfyError, match="There is no file"):
        server.run(loaded(bad.name))
    np.testing.assert_array_equal(one(server, loaded(str(kept.relative_to(server.models / FOLDER)))), direct)
