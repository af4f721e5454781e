"""`evaluate`: adapters on held-out samples -> pictures, their CLIP scores, and a table of the form of Table 1."""

import logging
from collections.abc import Sequence
from functools import cache
from itertools import compress
from pathlib import Path

import torch
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.checkpoint import load
from ipadapter_instruct_core.encoders import load_open_clip
from ipadapter_instruct_core.tasks import Task, defaults
from PIL import Image
from tqdm import tqdm
from training.datasets.sample import decode_picture, encode_picture
from training.datasets.shards import read_manifest
from training.evaluate.cases import CONDITIONS, Case, held_out, reworded
from training.evaluate.index import Picture, write_index_line
from training.evaluate.scores import Rows, Score, as_json, markdown_table
from training.evaluate.settings import FREE_SETTINGS, EvaluateConfig
from training.files import sha256, write_atomically, write_json
from training.frozen.base import fingerprint
from training.frozen.encoders import Encoders, load_encoders, picture_tensor
from training.frozen.fit import check_fit
from training.frozen.metrics import OF_CAPTIONS, TASK_METRICS, Embedder, task_scores
from training.frozen.network import embedding, prepare
from training.frozen.sampling import Settings, conditionings, initial_noise, sample, to_pictures
from training.held import defaults_of, hash_of, hold
from training.instructions.choose import wordings

log = logging.getLogger("ipadapter_instruct")
warn_once = cache(log.warning)

ALL = "all"
SETTINGS = "settings.json"
Made = dict[str, dict[Task, list[Path]]]  # by row


def run(config: EvaluateConfig) -> None:
    """Make what pictures are missing, then score all, by one scorer after another.

    Raises:
        ValueError: a file is missing or does not fit, or there are no samples of a task.
    """
    cases = held_out(config)
    made, image_encoder = _all_pictures(config, cases)
    tables: dict[str, Rows] = {}
    others = 0
    for scorer in config.scorer:
        model = load_open_clip(str(scorer))
        others += fingerprint(model) != image_encoder
        tables[str(scorer)] = score(Embedder(model.to(config.device)), cases, made)
    if not others:
        log.warning(
            "The only scorer is the encoder that the adapters read, and are trained to please; give a second one, too."
        )
    settings = {key: str(value) for key, value in config.model_dump(mode="json").items()}
    write_json(config.out / "scores.json", {"settings": settings, "scorers": as_json(tables)})
    table = "\n".join(f"Scored by {scorer}:\n\n{markdown_table(rows)}" for scorer, rows in tables.items())
    write_atomically(config.out / "table.md", table.encode())
    print(table)


def _all_pictures(config: EvaluateConfig, cases: dict[Task, list[Case]]) -> tuple[Made, str]:
    """Files of each row's pictures of each task, rewordings left out; and the image encoder's fingerprint."""
    encoders = load_encoders(config, with_network=True)
    if config.text_scale is None:
        config = config.model_copy(update={"text_scale": defaults(Task.EVERYTHING, encoders.base.kind).text_scale})
    models = {**encoders.identities(), "unet": fingerprint(encoders.base.network)}
    adapters = _load_adapters(config, encoders, prepare(encoders.base.network))
    device = torch.device(config.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    encoders.to(device, dtype)
    torch.nn.Module.to(encoders.base.network, device, dtype)
    config.out.mkdir(parents=True, exist_ok=True)
    hold_to_settings(config, models, cases)
    made: Made = {row: {} for row in config.rows}
    for row, files in config.rows.items():
        for task, chosen in cases.items():
            path = files.get(task.value, files.get(ALL))
            if path is not None:
                asked = [*chosen, *reworded(config, task, chosen)]
                paths = make_pictures(config, encoders, adapters[path].to(device, dtype), row, task, asked)
                made[row][task] = paths[: len(chosen)]
    return made, models["image_encoder"]


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
        check_fit(path.name, own, widths, layers, encoders.base.kind)
        if own.follows_instructions and own.instruction_encoder is not given:
            raise ValueError(
                f"{path.name} reads instructions by {own.instruction_encoder.value}, not {given.value}; "
                "change --instruction-encoder."
            )
    return adapters


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
    conditions = conditionings(adapter, features, encoders.rows(), settings, embedding(encoders.base.network))
    side = config.resolution // 8
    noise = initial_noise([case.seed for case in cases], (encoders.base.latent_channels, side, side))
    latents = sample(encoders.base, conditions, settings.coefficients(), noise, config.steps)
    return to_pictures(encoders.base.decode(latents))


def score(embedder: Embedder, cases: dict[Task, list[Case]], made: Made) -> Rows:
    """Table 1's scores of all pictures, with intervals by the samples' groups."""
    rows: Rows = {}
    for task, chosen in cases.items():
        if task not in TASK_METRICS:
            continue
        samples = [case.sample for case in chosen]
        captioned = [bool(entry.caption) for entry in samples]
        _warn_of_bare(task, captioned)
        known = (
            embedder.images(case.condition for case in chosen),
            embedder.texts([entry.prompt for entry in samples]),
            embedder.texts([entry.caption for entry in samples]),
        )
        groups = [entry.group for entry in samples]
        of_captioned = list(compress(groups, captioned))
        for row, paths in made.items():
            if task in paths:
                images = embedder.images(decode_picture(path.read_bytes()) for path in paths[task])
                rows.setdefault(row, {})[task] = {
                    metric: Score.of(metric, values, of_captioned if metric in OF_CAPTIONS else groups)
                    for metric, values in task_scores(task, images, *known, captioned).items()
                }
    return {row: rows[row] for row in made if row in rows}


def _warn_of_bare(task: Task, captioned: list[bool]) -> None:
    scores = [name for name in TASK_METRICS[task] if name in OF_CAPTIONS]
    if scores and not all(captioned):
        warn_once(
            f"{captioned.count(False)} of {len(captioned)} {task.value} samples do not say what their condition shows, "
            f"which {scores[0]} reads: it leaves them out; build with captions or --prompts endpoint to have them."
        )
