"""`evaluate`: adapters on held-out samples -> pictures, their CLIP scores, and a table of the form of Table 1."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.checkpoint import load
from ipadapter_instruct_core.encoders import load_open_clip
from ipadapter_instruct_core.tasks import Task, defaults
from PIL import Image
from pydantic import ConfigDict, Field
from torch import Tensor
from tqdm import tqdm
from training.datasets.sample import Sample, decode_picture, encode_picture
from training.datasets.shards import Shards, Tally, read_manifest
from training.evaluate.index import Picture, write_index_line
from training.evaluate.scores import Results, markdown_table
from training.files import sha256, write_atomically
from training.frozen.base import fingerprint
from training.frozen.encoders import EncoderPaths, Encoders, load_encoders, picture_tensor
from training.frozen.fit import check_fit
from training.frozen.metrics import OF_CAPTIONS, TASK_METRICS, Embedder, task_scores
from training.frozen.network import embedding, prepare
from training.frozen.sampling import Settings, conditionings, initial_noise, sample, to_pictures
from training.held import defaults_of, hash_of, hold
from training.instructions.choose import Wording, drawn, wordings

log = logging.getLogger("ipadapter_instruct")

ALL = "all"
CONDITIONS = "conditions"
SETTINGS = "settings.json"
# What may change when a folder of pictures is gone on with: no picture depends on it, and rows are held one by one.
FREE_SETTINGS = {"rows", "out", "scorer", "batch_size", "max_skipped", "device"}


class EvaluateConfig(EncoderPaths):
    """Settings of `python -m training evaluate`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    rows: dict[str, dict[str, Path]]
    """Rows of the table, each with its adapter files by task; "all" stands for the tasks not named."""
    data: list[Path]
    """Folders of shards from `build`; their validation samples are used."""
    out: Path
    """Folder for pictures, scores.json and table.md."""
    scorer: Path
    """The open_clip model of the scores, both towers."""
    samples: int = Field(1000, ge=1)
    """Samples a task at most."""
    instructions: Wording = "unseen"
    """The tasks' fixed wordings, random ones of the bank, or random ones that were never trained on."""
    rewordings: int = Field(0, ge=0)
    """Further wordings for the first two samples of each task, for the figure; they are not scored."""
    batch_size: int = Field(8, ge=1)
    """Pictures made at once."""
    resolution: int = 512
    """Side of the pictures."""
    steps: int = 30
    """Sampling steps."""
    text_scale: float | None = None
    """Guidance scale of the text; by default the base's: 5 on SD1.5, 7 on SDXL."""
    weight: float | None = None
    """Strength of the adapters; by default each task's own."""
    guidance: Literal["task", "simple"] = "task"
    """Each task's reference guidance, or simple guidance for all."""
    seed: int = 0
    """Decides noise and instructions; every row gets the same."""
    max_skipped: float = 0.01
    """Largest share of samples that may be damaged before the run stops."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where everything runs."""


@dataclass(frozen=True)
class Case:
    """One picture to make: a held-out sample, told to do its task in certain words.

    ``original`` is the index of the case that this one rewords, None where it is no rewording.
    """

    index: int
    sample: Sample
    instruction: str
    seed: int
    original: int | None = None

    @property
    def condition_name(self) -> str:
        """A rewording's is that of its original, by which figures find the two."""
        return f"{CONDITIONS}/{self.sample.task.value}/{self.index if self.original is None else self.original:05d}.jpg"

    @property
    def condition(self) -> Image.Image:
        return decode_picture(self.sample.condition)


def run(config: EvaluateConfig) -> None:
    """Make what pictures are missing, then score all.

    Raises:
        ValueError: a file is missing or does not fit, or there are no samples of a task.
    """
    encoders = load_encoders(config, with_unet=True)
    if config.text_scale is None:
        config = config.model_copy(update={"text_scale": defaults(Task.EVERYTHING, encoders.base.kind).text_scale})
    models = {**encoders.identities(), "unet": fingerprint(encoders.base.unet)}
    layers = prepare(encoders.base.unet)
    adapters = _load_adapters(config, encoders, layers)
    device = torch.device(config.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    encoders.to(device, dtype)
    torch.nn.Module.to(encoders.base.unet, device, dtype)
    embedder = Embedder(load_open_clip(str(config.scorer)).to(device))
    cases = held_out(config)
    config.out.mkdir(parents=True, exist_ok=True)
    hold_to_settings(config, models, cases)
    results = Results(settings={key: str(value) for key, value in config.model_dump(mode="json").items()})
    known = {task: _embed(embedder, task, chosen) for task, chosen in cases.items() if task in TASK_METRICS}
    for row, files in config.rows.items():
        for task, chosen in cases.items():
            path = files.get(task.value, files.get(ALL))
            if path is None:
                continue
            adapter = adapters[path].to(device, dtype)
            made = make_pictures(config, encoders, adapter, row, task, [*chosen, *reworded(config, task, chosen)])
            if task in known:
                images = embedder.images([_read(path) for path in made[: len(chosen)]])
                results.add(row, task, task_scores(task, images, *known[task]))
    results.write(config.out / "scores.json")
    table = markdown_table(results)
    write_atomically(config.out / "table.md", table.encode())
    print(table)


def hold_to_settings(config: EvaluateConfig, models: dict[str, str], cases: dict[Task, list[Case]]) -> None:
    """Pictures that are there are not made again, so each run in a folder is held to what made them.

    Raises:
        ValueError: a setting, a frozen model, the samples, the wordings or a row's file are others than in an earlier
            run; rows may be added.
    """
    path = config.out / SETTINGS
    settings = config.model_dump(mode="json", exclude=FREE_SETTINGS)
    for row, files in config.rows.items():
        settings |= {f"the {task} adapter of {row}": sha256(file) for task, file in files.items()}
    told = hash_of(words for task in cases for words in wordings(config.instructions, task))
    facts = {"models": models, "shards": _shards_of(config), "wordings": told}
    hold(path, settings | facts, "pictures made", defaults_of(EvaluateConfig))


def _shards_of(config: EvaluateConfig) -> str:
    """The hash of all that hold samples to validate with."""
    shards = [shard for folder in config.data for shard in read_manifest(folder, "build")["shards"]]
    return hash_of(shard["sha256"] for shard in shards if shard["name"].startswith("validation"))


def _load_adapters(
    config: EvaluateConfig, encoders: Encoders, layers: Sequence[tuple[int, int]]
) -> dict[Path, Adapter]:
    known = {ALL, *(task.value for task in Task)}
    for row, files in config.rows.items():
        unknown = set(files) - known
        if unknown:
            raise ValueError(f'Row "{row}" names the task {unknown.pop()!r}; tasks are {", ".join(sorted(known))}.')
        if row == CONDITIONS:
            raise ValueError(f'A row cannot be named "{row}", which is the folder of the condition pictures.')
    adapters, widths, given = {}, encoders.widths(), encoders.instruction_encoder
    for path in {path for files in config.rows.values() for path in files.values()}:
        adapters[path] = load(path).float()
        own = adapters[path].config
        check_fit(path.name, own, widths, layers)
        if own.follows_instructions and own.instruction_encoder is not given:
            raise ValueError(
                f"{path.name} reads instructions by {own.instruction_encoder.value}, not {given.value}; "
                "change --instruction-encoder."
            )
    return adapters


def held_out(config: EvaluateConfig) -> dict[Task, list[Case]]:
    """The first validation samples of each task.

    Raises:
        ValueError: there are none.
    """
    tally = Tally(config.max_skipped)
    cases: dict[Task, list[Case]] = {}
    for folder in config.data:
        names = [shard["name"] for shard in read_manifest(folder, "build")["shards"]]
        shards = Shards([folder / name for name in names if name.startswith("validation")], tally)
        tally.good(len(shards))
        for index in range(len(shards)):
            try:
                entry = Sample.from_members(shards[index])
                entry.pictures()
            except (KeyError, TypeError, ValueError) as error:
                tally.lose(shards.name(index), str(error))
                continue
            of_task = cases.setdefault(entry.task, [])
            if len(of_task) < config.samples:
                seed = config.seed * 1_000_003 + len(of_task)
                words = drawn(config.instructions, entry.task, entry.subject, seed)
                of_task.append(Case(len(of_task), entry, words, seed))
    tally.check()
    for name, why in tally.skipped:
        log.warning("evaluate: skipped %s: %s", name, why)
    if not cases:
        raise ValueError("The data hold no validation samples; build them with --validation of at least 1.")
    return cases


def reworded(config: EvaluateConfig, task: Task, cases: Sequence[Case]) -> list[Case]:
    """The first two cases again, with the same noise and other instructions."""
    count = config.rewordings
    return [
        Case(
            len(cases) + place * count + n,
            case.sample,
            drawn(config.instructions, task, case.sample.subject, case.seed + 1 + n),
            case.seed,
            case.index,
        )
        for place, case in enumerate(cases[:2])
        for n in range(count)
    ]


@torch.inference_mode()
def make_pictures(
    config: EvaluateConfig, encoders: Encoders, adapter: Adapter, row: str, task: Task, cases: Sequence[Case]
) -> list[Path]:
    """Files of the row's picture of each case; those that an interrupted run has made are not made again."""
    pictures = [
        Picture(row, task, case.index, case.condition_name, case.sample.prompt, case.instruction) for case in cases
    ]
    pairs = list(zip(cases, pictures, strict=True))
    missing = [pair for pair in pairs if not (config.out / pair[1].name).is_file()]
    starts = range(0, len(missing), config.batch_size)
    for start in tqdm(starts, desc=f"{row}, {task.value}", unit="batch", disable=not missing):
        batch = missing[start : start + config.batch_size]
        made = picture_batch(config, encoders, adapter, task, [case for case, _ in batch])
        for (case, picture), image in zip(batch, made, strict=True):
            _keep(config.out / picture.condition, case.condition)
            write_index_line(config.out, picture)
            _keep(config.out / picture.name, image)  # last, since a picture that is there is not made again
    return [config.out / picture.name for picture in pictures]


def _read(path: Path) -> Image.Image:
    return decode_picture(path.read_bytes())


def _keep(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, encode_picture(image))


def picture_batch(
    config: EvaluateConfig, encoders: Encoders, adapter: Adapter, task: Task, cases: Sequence[Case]
) -> list[Image.Image]:
    """One picture a case."""
    preprocess = encoders.image_tower.preprocess
    features = {
        "image": encoders.image_states(torch.cat([preprocess(picture_tensor(case.condition)) for case in cases])),
        "instruction": encoders.instruction_states([case.instruction for case in cases]),
        **encoders.text_features([case.sample.prompt for case in cases]),
    }
    simple = config.guidance == "simple" or not adapter.config.follows_instructions
    settings = Settings.of_task(task, encoders.base.kind, config.steps, config.text_scale, config.weight, simple)
    conditions = conditionings(adapter, features, encoders.rows(), settings, embedding(encoders.base.unet))
    side = config.resolution // 8
    noise = initial_noise([case.seed for case in cases], (encoders.base.latent_channels, side, side))
    latents = sample(encoders.base, conditions, settings.coefficients(), noise, config.steps)
    return to_pictures(encoders.base.decode(latents))


def _embed(embedder: Embedder, task: Task, cases: Sequence[Case]) -> tuple[Tensor, Tensor, Tensor, list[bool]]:
    """What does not depend on the adapter: embeddings of condition, prompt and caption, and which have a caption."""
    samples = [case.sample for case in cases]
    captioned = [bool(entry.caption) for entry in samples]
    scores = [name for name in TASK_METRICS[task] if name in OF_CAPTIONS]
    if scores and not all(captioned):
        log.warning(
            f"{captioned.count(False)} of {len(cases)} {task.value} samples do not say what their condition shows, "
            f"which {scores[0]} reads: it leaves them out; build with captions or --prompts endpoint to have them."
        )
    return (
        embedder.images([case.condition for case in cases]),
        embedder.texts([entry.prompt for entry in samples]),
        embedder.texts([entry.caption for entry in samples]),
        captioned,
    )
