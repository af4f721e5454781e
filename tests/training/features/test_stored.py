"""What a step is given of each draw, and that it is what guidance later evaluates; raw shards and features agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from ipadapter_instruct_core.checkpoint import load
from ipadapter_instruct_core.config import Form
from ipadapter_instruct_core.guidance import Row
from ipadapter_instruct_core.tasks import GuidanceMode, Task
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file
from shards_of_photographs import save_shards
from tiny_base import WIDTH, save_sdxl
from torch import Tensor
from training.datasets.shards import Tally
from training.features import encode
from training.features.draws import Draw, Draws, Dropout, Dropped
from training.features.encode import EncodeConfig
from training.features.stored import FeatureSource, RawSource, encode_batch
from training.frozen.encoders import EncoderPaths, Encoders, load_encoders
from training.frozen.sampling import Settings, conditionings
from training.instructions import load_bank
from training.train.adapter import TrainedAdapter
from training.train.batches import Drawn, collate

TASKS = (Task.EVERYTHING, Task.OBJECT, Task.STYLE)  # as their folders sort
PHRASES = 31  # of the bank, that features have with a subject's name


@dataclass
class Setup:
    """One base: features, the same samples raw, and the encoders."""

    features: FeatureSource
    raw: RawSource
    encoders: Encoders
    tables: dict[str, Tensor]

    def draw(self, task: Task, dropped: Dropped, number: int = 2, instruction: float = 0.4) -> Draw:
        return Draw(task, self.features.by_task[task][number], instruction, dropped, timestep=600, noise_seed=7)

    def sample(self, task: Task, number: int = 2) -> dict[str, Tensor]:
        """The features of a sample as they lie in the shard."""
        return load_bytes(self.features.shards[self.features.by_task[task][number]]["safetensors"])


class RawAsEncoded(RawSource):
    """Draws a subject's wordings from those that `encode` took for it."""

    def instruction(self, draw: Draw) -> str:
        if subject := self.shards.subject(draw.sample):
            some = Random(subject).sample(load_bank()[Task.OBJECT], PHRASES)
            self.phrases = {**self.phrases, Task.OBJECT: some}
        return super().instruction(draw)


def made(base: Path, clip: Path, data: list[Path], features: Path, phrases: dict[Task, list[str]]) -> Setup:
    encoders = load_encoders(EncoderPaths(base=base, image_encoder=clip))
    raw = RawAsEncoded(data, "train", Tally(0.0), encoders.image_tower.preprocess, 64, phrases)
    source = FeatureSource(features, "train", Tally(0.0))
    return Setup(source, raw, encoders, load_file(features / encode.INSTRUCTIONS))


@pytest.fixture(scope="module")
def sd15(workshop: Path, features: Path) -> Setup:
    folders = [workshop / "data" / task.value for task in TASKS]
    return made(workshop / "base", workshop / "clip", folders, features, load_bank())


@pytest.fixture(scope="module")
def sdxl(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("sdxl")
    base = save_sdxl(folder / "base")
    tasks = (Task.EVERYTHING, Task.STYLE)
    data = [save_shards(folder / "data" / task.value, task, 4, validation=0) for task in tasks]
    phrases = {task: [f"{task.value}, wording {n}" for n in range(4)] for task in tasks}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "load_bank", lambda: phrases)
        encode.run(
            EncodeConfig(
                data=data, base=base, image_encoder=workshop / "clip", resolution=64, precision="fp32", device="cpu",
                out=folder / "features",
            )
        )  # fmt: skip
    return made(base, workshop / "clip", data, folder / "features", phrases)


@pytest.fixture(params=["sd15", "sdxl"])
def setup(request: pytest.FixtureRequest) -> Setup:
    return request.getfixturevalue(request.param)


WHERE: dict[Dropped, dict[str, str]] = {
    # kind: what each input is; "own" is the sample's, other names are of rows.safetensors
    Dropped.NOTHING: {"image": "own", "instruction": "own", "prompt": "own", "text": "own", "pooled": "own"},
    Dropped.TEXT: {"image": "own", "instruction": "own", "prompt": "own", "text": "empty_text", "pooled": "own"},
    Dropped.WORDS: {
        "image": "own",
        "instruction": "empty_instruction",
        "prompt": "empty_prompt",
        "text": "empty_text",
        "pooled": "own",
    },
    Dropped.IMAGE: {"image": "zero_image", "instruction": "own", "prompt": "own", "text": "own", "pooled": "own"},
    Dropped.ALL: {
        "image": "zero_image",
        "instruction": "empty_instruction",
        "prompt": "empty_prompt",
        "text": "empty_text",
        "pooled": "empty_pooled",
    },
}


@pytest.mark.parametrize("dropped", list(Dropped))
@pytest.mark.parametrize("task", [Task.EVERYTHING, Task.STYLE])
def test_dropped_conditions_are_replaced(setup: Setup, task: Task, dropped: Dropped) -> None:
    item, own, rows = setup.features.item(setup.draw(task, dropped)), setup.sample(task), setup.features.rows
    own.setdefault("prompt", own["text"])
    rows = {"empty_prompt": rows["empty_text"], **rows}
    table = setup.tables[task.value]
    own["instruction"] = table[1 + int(0.4 * (len(table) - 1))]
    if dropped is Dropped.TEXT and task is Task.EVERYTHING:
        own["instruction"] = rows["everything_instruction"]
    for name, source in WHERE[dropped].items():
        if name in own:
            assert torch.equal(item[name], own[name] if source == "own" else rows[source]), name
    names = {"image", "instruction", "prompt", "text", "noise", "latents"}
    assert item.keys() == (names | {"pooled"} if "pooled" in own else names)


def test_what_is_dropped_can_be_told_from_what_is_kept(setup: Setup) -> None:
    """Else the test before would prove nothing."""
    own, rows = setup.sample(Task.STYLE), setup.features.rows
    pairs = {"image": "zero_image", "text": "empty_text", "prompt": "empty_prompt", "pooled": "empty_pooled"}
    for name, row in pairs.items():
        assert name not in own or not torch.equal(own[name], rows[row])
    everything, none = rows["everything_instruction"], rows["empty_instruction"]
    assert not torch.equal(everything, none)
    assert not any(torch.equal(everything, states) for states in setup.tables["everything"][:5])


def test_latents_are_drawn_from_their_distribution(sd15: Setup) -> None:
    draw, own = sd15.draw(Task.STYLE, Dropped.NOTHING), sd15.sample(Task.STYLE)
    generator = torch.Generator().manual_seed(7)
    eps, noise = torch.randn(4, 8, 8, generator=generator), torch.randn(4, 8, 8, generator=generator)
    item = sd15.features.item(draw)
    torch.testing.assert_close(item["latents"], own["latent_mean"] + own["latent_deviation"] * eps)
    assert torch.equal(item["noise"], noise)


def test_a_subjects_phrasings_name_it(sd15: Setup) -> None:
    for number, name in enumerate(("astronaut", "chelsea", "coffee", "rocket")):
        item = sd15.features.item(sd15.draw(Task.OBJECT, Dropped.NOTHING, number, instruction=0.999))
        assert torch.equal(item["instruction"], sd15.tables[f"object/{name}"][PHRASES])


def test_fixed_instructions_are_always_the_first(workshop: Path, sd15: Setup) -> None:
    source = FeatureSource(sd15.features.features, "train", Tally(0.0), fixed_share=1.0)
    for task, name in ((Task.STYLE, "style"), (Task.OBJECT, "object/coffee")):
        for instruction in (0.0, 0.5, 0.999):
            draw = sd15.draw(task, Dropped.NOTHING, 2, instruction)
            assert torch.equal(source.item(draw)["instruction"], sd15.tables[name][0])


def test_a_share_of_the_instructions_is_fixed(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in (setup.features, setup.raw):
        monkeypatch.setattr(source, "fixed_share", 0.25)
        draws = [setup.draw(Task.STYLE, Dropped.NOTHING, instruction=number) for number in (0, 0.249, 0.25, 0.5, 0.999)]
        assert [source.wording(draw, 3) for draw in draws] == [0, 0, 1, 2, 3]
    assert [setup.raw.instruction(draws[at]) for at in (1, 2)] == ["use the style", setup.raw.phrases[Task.STYLE][0]]
    assert torch.equal(setup.features.item(draws[1])["instruction"], setup.tables["style"][0])


GUIDED = {
    Row.FULL: Dropped.NOTHING,
    Row.EVERYTHING: Dropped.TEXT,
    Row.IMAGE: Dropped.WORDS,
    Row.UNCOND: Dropped.ALL,
}
ALL_ROWS = Settings(text_scale=5.0, weight=1.0, guidance=GuidanceMode.THREE_WAY, instruct_scale=2.0, image_scale=0.5)


@pytest.mark.parametrize("row", list(Row))
def test_guidance_evaluates_what_was_trained(setup: Setup, row: Row) -> None:
    """On one replication sample, sampling feeds the projector and the UNet the very tensors that training fed them."""
    task, fed = Task.EVERYTHING, {}
    own = setup.features.item(setup.draw(task, Dropped.NOTHING))
    trained = setup.features.item(setup.draw(task, GUIDED[row]))

    def projector(image: Tensor, instruction: Tensor, prompt: Tensor) -> Tensor:
        fed.update(image=image[0], instruction=instruction[0], prompt=prompt[0])
        return torch.zeros(1)

    projector.latents = torch.zeros(1)
    config = SimpleNamespace(form=Form.CROSS)
    adapter = SimpleNamespace(image_proj=projector, key_values=lambda t, _: [(t, t)], config=config)
    inputs = {name: own[name][None] for name in own if name in ("image", "instruction", "prompt", "text", "pooled")}
    only = SimpleNamespace(coefficients=lambda: {row: 1.0}, weight=1.0)
    condition = conditionings(adapter, inputs, setup.features.rows, only)[row]
    assert set(ALL_ROWS.coefficients()) == set(GUIDED)
    for name in ("image", "instruction", "prompt"):
        assert torch.equal(fed[name], trained[name]), name
    assert torch.equal(condition.text[0], trained["text"])
    assert ("pooled" in trained) == (condition.pooled is not None)
    if condition.pooled is not None:
        assert torch.equal(condition.pooled[0], trained["pooled"])


@pytest.mark.parametrize("prompt_width", [None, WIDTH], ids=["paper", "released"])
def test_rows_have_the_keys_and_values_that_were_trained(workshop: Path, sd15: Setup, prompt_width: int | None) -> None:
    """With the whole adapter, without prompt layers and with them."""
    torch.manual_seed(0)
    adapter = load(workshop / "start.safetensors").with_instruction(WIDTH, prompt_width)
    for parameter in adapter.parameters():  # new layers that are zero would tell nothing apart
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    own = sd15.features.item(sd15.draw(Task.EVERYTHING, Dropped.NOTHING))
    inputs = {name: own[name][None] for name in ("image", "instruction", "prompt", "text")}
    with torch.no_grad():
        guided = conditionings(adapter, inputs, sd15.features.rows, ALL_ROWS)
        found = {row: torch.cat([part.flatten() for pair in guided[row].image for part in pair]) for row in GUIDED}
        for row, dropped in GUIDED.items():
            item = sd15.features.item(sd15.draw(Task.EVERYTHING, dropped))
            trained = TrainedAdapter(adapter)(*(item[name][None] for name in ("image", "instruction", "prompt")))
            expected = torch.cat([part.flatten() for pair in trained for part in pair])
            torch.testing.assert_close(found[row], expected)
    differences = [(found[a] - found[b]).abs().max() for a in GUIDED for b in GUIDED if a is not b]
    assert min(differences) > 1e-3


def test_raw_shards_and_features_give_the_same_batch(setup: Setup) -> None:
    assert setup.raw.by_task == setup.features.by_task
    weights = dict.fromkeys(setup.raw.by_task, 1.0)
    draws = Draws(3, setup.raw.by_task, weights, Dropout(text=0.2, words=0.2, image=0.2, all=0.1))
    slots = [(1, position) for position in range(24)]
    kinds = [draws.draw(*slot) for slot in slots]
    assert {draw.dropped for draw in kinds} == set(Dropped) and {draw.task for draw in kinds} == set(weights)
    batches = [collate([Drawn(source, draws)[slot] for slot in slots]) for source in (setup.raw, setup.features)]
    with torch.no_grad():
        raw, features = encode_batch(setup.encoders, batches[0]), batches[1]
    assert raw.keys() == features.keys()
    for name, expected in features.items():
        if isinstance(expected, Tensor):
            torch.testing.assert_close(raw[name], expected, rtol=1e-4, atol=1e-4)
        else:
            assert raw[name] == expected, name


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        pytest.param(
            lambda folder: (folder / encode.ROWS).unlink(), "holds no rows.safetensors: `encode` was", id="rows"
        ),
        pytest.param(
            lambda folder: (folder / encode.INSTRUCTIONS).unlink(),
            "holds no instructions.safetensors: `encode` was interrupted; give its command again",
            id="instructions",
        ),
        pytest.param(
            lambda folder: (folder / "style" / "train-00001.tar").unlink(),
            "style/train-00001.tar is missing: `encode` was interrupted; give its command again",
            id="shard",
        ),
        pytest.param(
            lambda folder: (folder / "manifest.json").unlink(),
            "holds no manifest.json; make it with `python -m training encode`",
            id="manifest",
        ),
        pytest.param(
            lambda folder: [path.unlink() for path in folder.glob("*/manifest.json")],
            "There are no train samples in .*; build or encode a dataset first",
            id="empty",
        ),
    ],
)
def test_features_that_are_not_whole_are_told(
    features: Path, tmp_path: Path, damage: Callable[[Path], None], told: str
) -> None:
    import shutil

    folder = Path(shutil.copytree(features, tmp_path / "features"))
    damage(folder)
    with pytest.raises(ValueError, match=told):
        FeatureSource(folder, "train", Tally(0.1))
