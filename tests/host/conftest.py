"""The real host in the test's own process, before any test module imports `comfy`, and tiny models on it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from tools.host.server import ComfyServer
from tools.tiny.models import MIN_ADAPTER, MIN_CHECKPOINT, SD35_ADAPTER, SD35_CHECKPOINT, TINY_NAMES

inside.start()

import comfy.model_management as management  # noqa: E402
from bench import Bench, Sd3Bench, sd3_of  # noqa: E402


@pytest.fixture(scope="module")
def bench(tiny_models: Path) -> Bench:
    """The smallest base model, with three cross-attentions."""
    return Bench(tiny_models, MIN_CHECKPOINT, MIN_ADAPTER)


@pytest.fixture(scope="module")
def full_bench(tiny_models: Path) -> Bench:
    """SD1.5's very blocks, with sixteen."""
    checkpoint = TINY_NAMES["v1-5-pruned-emaonly-fp16.safetensors"]
    return Bench(tiny_models, checkpoint, TINY_NAMES["ip-adapter-instruct-sd15.bin"])


@pytest.fixture(scope="session")
def sd3_bench(tiny_models: Path) -> Sd3Bench:
    return sd3_of(tiny_models)


@pytest.fixture(scope="session")
def sd35_bench(tiny_models: Path) -> Sd3Bench:
    """The same of SD3.5, each block with a second attention of the image alone."""
    made = Sd3Bench(tiny_models, SD35_CHECKPOINT, SD35_ADAPTER, torch.float32)
    made.normed = True
    return made


@pytest.fixture(params=["sd3", "sd35"])
def flow_bench(request: pytest.FixtureRequest) -> Sd3Bench:
    return request.getfixturevalue(f"{request.param}_bench")


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The `SmallWorld`, whose adapter tests may break: `world` has it whole."""
    from meaning import STEPS
    from small_world import SmallWorld
    from training.miniature.expand.write import write_models

    with torch.inference_mode():
        return SmallWorld(write_models(tmp_path_factory.mktemp("miniature")), STEPS)


@pytest.fixture
def world(miniature: Any) -> Any:
    miniature.renew()
    return miniature


@pytest.fixture
def models_file(server: ComfyServer) -> Iterator[Callable[[str, str, Any], str]]:
    """Puts a file, of bytes or of weights, into the server's models folder for the length of a test."""
    made: list[Path] = []

    def put(folder: str, name: str, content: Any) -> str:
        path = server.models / folder / name
        path.parent.mkdir(exist_ok=True)
        made.append(path)
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        return name

    yield put
    for path in made:
        path.unlink()


@pytest.fixture(autouse=True)
def _as_the_host_runs_nodes() -> Iterator[None]:
    forget_dead_models()  # an error's frames may have kept some beyond the test before
    with torch.inference_mode():
        yield
    forget_dead_models()


def forget_dead_models() -> None:
    """Take chains of clones that ended with a test, whose parents a graph would keep, from the host's list: for each in
    it, the host collects all garbage before every run, which took up to four fifths of these tests' time."""
    loaded = management.current_loaded_models
    loaded[:] = [each for each in loaded if each.model is not None]
