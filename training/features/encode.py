"""`encode`: run every frozen encoder once over shards of samples, and keep the results as shards of features."""

import json
import logging
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple

import torch
from ipadapter_instruct_core.tasks import Task
from pydantic import Field
from torch import Tensor
from tqdm import tqdm
from training.datasets.index import Shards, index_of
from training.datasets.sample import Sample
from training.datasets.shards import MANIFEST, Tally, read_manifest, write_shard
from training.files import ranks, remove_leftovers, write_atomically, write_json
from training.frozen.encoders import EncoderPaths, Encoders, load_encoders, picture_tensor, target_pixels
from training.held import hash_of, hold
from training.instructions import load_bank
from training.instructions.choose import about, table

log = logging.getLogger("ipadapter_instruct")

FORMAT = 1
INSTRUCTIONS = "instructions.safetensors"
TEXTS = "texts_sha256"  # in its metadata
ROWS = "rows.safetensors"
LARGEST_TABLES = 20e9  # bytes: the tables of all instructions are made in memory
THREADS = min(16, 2 + (os.cpu_count() or 1))  # that decode pictures, of each rank
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class EncodeConfig(EncoderPaths):
    """Settings of `python -m training encode`."""

    data: list[Path]
    """Folders of shards, as `build` writes them."""
    out: Path
    """Folder for the features: a folder a dataset in it."""
    resolution: int = 512
    """Side of the square that targets are cut to, in pixels."""
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    """In which tokens are kept; latents are kept in full."""
    batch_size: int = 16
    """Samples encoded at once."""
    phrases_per_subject: int = Field(32, ge=2)
    """How many phrasings of the object task are encoded with each subject's name: the fixed one, and others by lot."""
    max_skipped: float = 0.01
    """Largest share of samples that may be damaged before the run stops."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the encoders run; under `accelerate launch` each rank takes the card of its number."""


def run(config: EncodeConfig) -> None:
    """Encode what is not encoded yet; ranks of a launch share the shards.

    Raises:
        ValueError: the settings differ from those of features already there, too many samples are damaged, or there are
            too many subjects.
    """
    rank, world = ranks()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if config.device == "cuda" else config.device
    half = torch.device(device).type == "cuda" and config.precision != "fp32"
    encoders = load_encoders(config)
    identities = encoders.identities()
    encoders.to(torch.device(device), PRECISIONS[config.precision] if half else torch.float32)
    config.out.mkdir(parents=True, exist_ok=True)
    settings = {
        "format": FORMAT,
        "kind": encoders.base.kind.value,
        "instruction_encoder": encoders.instruction_encoder.value,
        "encoders": identities,
        "resolution": config.resolution,
        "precision": config.precision,
    }
    hold(config.out / MANIFEST, settings, "features made")
    with torch.inference_mode():
        if rank == 0:
            _check_size(encoders, config)
        for folder in config.data:
            _encode_dataset(encoders, folder, config, rank, world)
        if rank == 0:
            _write_words(encoders, config)
    if rank == 0:
        log.info("encode: features of %d datasets in %s", len(config.data), config.out)


@dataclass
class _Found(Tally):
    """What was met in one shard."""

    small: int = 0  # targets that had to be enlarged


def _encode_dataset(encoders: Encoders, folder: Path, config: EncodeConfig, rank: int, world: int) -> None:
    """A shard is done when its record lies beside it, which also tells a later run what was skipped."""
    source = read_manifest(folder, "build")
    out = config.out / folder.name
    out.mkdir(exist_ok=True)
    hold(out / MANIFEST, {"source": {shard["name"]: shard["sha256"] for shard in source["shards"]}}, "features made")
    shards = source["shards"][rank::world]
    tally = Tally(config.max_skipped, seen=sum(shard["samples"] for shard in shards))
    warned = False
    for shard in tqdm(shards, desc=f"encode {folder.name}", unit="shard", disable=rank > 0):
        name, found = shard["name"], _Found(1.0)
        record = out / f"{Path(name).stem}.json"
        if not _is_done(out / name, record):
            record.unlink(missing_ok=True)
            remove_leftovers(record)
            samples = write_shard(out / name, _features_of_shard(encoders, folder / name, config, found))
            size = (out / name).stat().st_size
            told = {"samples": samples, "skipped": found.skipped, "small": found.small, "bytes": size}
            write_json(record, told | {"index": index_of(out / name)}, indent=None)
        done = json.loads(record.read_text(encoding="utf-8"))
        if done.get("small") and not warned:
            warned = True
            log.warning(
                "encode: targets of %s are smaller than %d pixels and were enlarged (%d of the %d in %s): a model "
                "learns their blur; build with a --size of %d at least, from sources of that size.",
                folder.name, config.resolution, done["small"], done["samples"], name, config.resolution,
            )  # fmt: skip
        for sample, why in done["skipped"]:
            tally.lose(sample, why)
        tally.unnamed += shard["samples"] - done["samples"] - len(done["skipped"])  # of a shard that is cut short
        try:
            tally.check()
        except ValueError:  # so that the shard is made again from a mended source
            record.unlink()
            (out / name).unlink()
            raise
    for name, why in tally.skipped:
        log.warning("encode: skipped %s: %s", name, why)


def _is_done(shard: Path, record: Path) -> bool:
    """Whether a shard was made and is still as long as it was: an aborted copy, or a cleaning, may have taken it."""
    if not (shard.is_file() and record.is_file()):
        return False
    size = shard.stat().st_size
    return json.loads(record.read_text(encoding="utf-8")).get("bytes", size) == size


def _features_of_shard(
    encoders: Encoders, path: Path, config: EncodeConfig, found: _Found
) -> Iterator[tuple[str, dict[str, bytes]]]:
    from safetensors.torch import save

    decoded = _decoded_samples(encoders, Shards([path], found), config, found)
    while batch := list(islice(decoded, config.batch_size)):
        for item, tensors in zip(batch, _encode_batch(encoders, batch, config), strict=True):
            yield item.key, {**item.files, "safetensors": save(tensors)}


class _Decoded(NamedTuple):
    key: str
    files: dict[str, bytes]
    prompt: str
    condition: Tensor
    target: Tensor
    small: bool


def _decoded_samples(encoders: Encoders, shard: Shards, config: EncodeConfig, found: _Found) -> Iterator[_Decoded]:
    """In the shard's order. Threads decode two batches ahead, so that a card does not wait for pictures."""
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="decode")
    try:
        places, waiting = iter(shard.readable), deque()
        while True:
            for place in islice(places, 2 * config.batch_size - len(waiting)):
                waiting.append((place, pool.submit(_decode, encoders, shard, place, config)))
            if not waiting:
                return
            place, future = waiting.popleft()
            try:
                decoded = future.result()
            except (KeyError, TypeError, ValueError) as error:
                found.lose(shard.name(place), str(error))
                continue
            found.small += decoded.small
            yield decoded
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(encoders: Encoders, shard: Shards, place: int, config: EncodeConfig) -> _Decoded:
    key, files = shard.read(place)
    sample = Sample.from_members(files)
    condition, target = sample.pictures()
    return _Decoded(
        key=key,
        # Validation looks at pictures, too; training only at their features.
        files=files if "validation" in shard.paths[0].name else {"json": files["json"]},
        prompt=sample.prompt,
        condition=encoders.image_tower.preprocess(picture_tensor(condition))[0],
        target=target_pixels(target, config.resolution),
        small=min(target.size) < config.resolution,
    )


def _encode_batch(encoders: Encoders, batch: list[_Decoded], config: EncodeConfig) -> Iterator[dict[str, Tensor]]:
    targets = torch.stack([item.target for item in batch]).to(encoders.base.device)
    mean, deviation = encoders.base.latent_distribution(targets)
    tokens = {
        "image": encoders.image_states(torch.stack([item.condition for item in batch])),
        **encoders.text_features([item.prompt for item in batch]),
    }
    dtype = PRECISIONS[config.precision]
    for n in range(len(batch)):
        latents = {"latent_mean": mean[n].float(), "latent_deviation": deviation[n].float()}
        words = {name: states[n].to(dtype) for name, states in tokens.items()}
        yield {name: tensor.cpu().contiguous() for name, tensor in (latents | words).items()}


def _write_words(encoders: Encoders, config: EncodeConfig) -> None:
    """The dropped conditions' rows, and the states of every instruction, if they are not those already there."""
    from safetensors.torch import save

    dtype = PRECISIONS[config.precision]
    rows = {name: states.to("cpu", dtype).contiguous().clone() for name, states in encoders.rows().items()}
    write_atomically(config.out / ROWS, save(rows))
    phrases = _phrases(config)
    told = hash_of(text for name, texts in phrases.items() for text in (name, *texts))
    if texts_of(config.out / INSTRUCTIONS) == told:
        return
    remove_leftovers(config.out / INSTRUCTIONS)
    states = {}
    for name, texts in tqdm(phrases.items(), desc="encode instructions", unit="set"):
        batches = [texts[n : n + config.batch_size] for n in range(0, len(texts), config.batch_size)]
        states[name] = torch.cat([encoders.instruction_states(batch).to("cpu", dtype) for batch in batches])
    write_atomically(config.out / INSTRUCTIONS, save(states, {TEXTS: told}))


def _check_size(encoders: Encoders, config: EncodeConfig) -> None:
    """Raises ValueError where the tables of instructions are too large for the memory, before hours of encoding."""
    phrases = _phrases(config)
    of_one = encoders.instruction_states([""])[0].numel() * PRECISIONS[config.precision].itemsize
    size = sum(map(len, phrases.values())) * of_one
    if size > LARGEST_TABLES:
        subjects = sum("/" in name for name in phrases)
        raise ValueError(
            f"The instructions of {subjects} subjects would take {size / 1e9:.3g} GB, more than the "
            f"{LARGEST_TABLES / 1e9:.3g} GB that are allowed; lower phrases_per_subject from "
            f"{config.phrases_per_subject}, or give fewer different subjects."
        )


def texts_of(path: Path) -> str:
    """The hash of the instructions whose states a file holds; "" where there is no whole file, or one without it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return (file.metadata() or {}).get(TEXTS, "")
    except (OSError, SafetensorError):
        return ""


def _phrases(config: EncodeConfig) -> dict[str, list[str]]:
    """The instructions of each table, ``task`` or ``object/subject``: the fixed one of a task comes first."""
    tasks, subjects = _tasks_and_subjects(config)
    if not tasks:
        raise ValueError(f"There are no samples in {', '.join(map(str, config.data))}; build a dataset first.")
    bank = load_bank()
    phrases = {task.value: table(task, bank) for task in sorted(tasks, key=lambda task: task.value)}
    for subject in sorted(subjects):
        always, *rest = phrases[Task.OBJECT.value]
        # Others for each subject, so that many subjects take in the whole bank; the same in every run.
        some = Random(subject).sample(rest, min(len(rest), config.phrases_per_subject - 1))
        phrases[f"{Task.OBJECT.value}/{subject}"] = [about(phrase, Task.OBJECT, subject) for phrase in (always, *some)]
    return phrases


def _tasks_and_subjects(config: EncodeConfig) -> tuple[set[Task], set[str]]:
    """Those of this run's samples, which other ranks may be encoding still, and of the features already there."""
    own = {folder.name for folder in config.data}
    paths = [folder / shard["name"] for folder in config.data for shard in read_manifest(folder, "build")["shards"]]
    for folder in sorted(path.parent for path in config.out.glob(f"*/{MANIFEST}") if path.parent.name not in own):
        paths += [path for name in read_manifest(folder, "encode")["source"] if (path := folder / name).is_file()]
    shards = Shards(paths, Tally(1.0))  # what is damaged was counted when its shard was encoded
    subjects = {shards.subject(place) for place in shards.by_task.get(Task.OBJECT, ())}
    return set(shards.by_task), subjects - {""}
