"""Where training samples come from: shards of features, or raw shards that are encoded at every step."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from ipadapter_instruct_core.tasks import EVERYTHING_ROW, Task, phrase
from PIL import Image
from torch import Tensor
from torch.profiler import record_function
from training.datasets.index import Shards
from training.datasets.sample import Sample
from training.datasets.shards import MANIFEST, Tally, read_manifest
from training.features.draws import Draw
from training.features.encode import INSTRUCTIONS, ROWS, texts_of
from training.frozen.encoders import Encoders, picture_tensor, target_pixels
from training.held import hash_of
from training.instructions.choose import about, table

log = logging.getLogger("ipadapter_instruct")


class Source:
    """Samples of one split of several folders, by task. A damaged one is skipped, counted and named.

    Attributes:
        sha256: of all raw shards of the split, also where these were encoded since.
        fixed_share: of the instructions, that are the task's fixed wording and not one of the bank.
    """

    def __init__(self, folders: Sequence[Path], split: str, tally: Tally, fixed_share: float = 0.0) -> None:
        self.fixed_share, self.tally = fixed_share, tally
        known = len(tally.skipped)
        hashes = {path: sha for folder in folders for path, sha in self._shards(folder) if path.name.startswith(split)}
        self.sha256 = hashlib.sha256(" ".join(sorted(hashes.values())).encode()).hexdigest()
        self.shards = Shards(list(hashes), tally)
        tally.check()
        for name, why in tally.skipped[known:]:
            log.warning("train: skipped %s: %s", name, why)
        self.by_task = self.shards.by_task
        if not self.by_task:
            named = ", ".join(str(folder) for folder in folders)
            without = ", or give --validation.every 0" if split == "validation" else ""
            raise ValueError(f"There are no {split} samples in {named}; build or encode a dataset first{without}.")

    def _shards(self, folder: Path) -> list[tuple[Path, str]]:
        """Paths, and the SHA-256 of what was built."""
        return [(folder / shard["name"], shard["sha256"]) for shard in read_manifest(folder, "build")["shards"]]

    def wording(self, draw: Draw, count: int) -> int:
        """0 for the task's fixed wording, else the number of one of ``count``, from 1."""
        share = self.fixed_share
        return 0 if draw.instruction < share else 1 + int((draw.instruction - share) / (1 - share) * count)

    def wordings_sha256(self) -> str:
        """Of all instructions that the samples may be told."""
        raise NotImplementedError

    def pictures(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Condition and target of a sample; shards of features hold them for validation samples alone."""
        return Sample.from_members(self.shards[index]).pictures()

    def item(self, draw: Draw) -> dict[str, Any]:
        """What a step needs of one draw, dropped conditions replaced.

        Raises:
            KeyError, ValueError, OSError: the sample is damaged.
        """
        raise NotImplementedError


class FeatureSource(Source):
    """Features as `encode` writes them: nothing is encoded during training."""

    def __init__(self, features: Path, split: str, tally: Tally, fixed_share: float = 0.0) -> None:
        """Raises ValueError where the folder holds no whole set of features."""
        self.features = features
        self.settings = read_manifest(features, "encode")
        for name in (ROWS, INSTRUCTIONS):
            if not (features / name).is_file():
                raise ValueError(f"{features} holds no {name}: `encode` was interrupted; give its command again.")
        super().__init__(sorted(path.parent for path in features.glob(f"*/{MANIFEST}")), split, tally, fixed_share)

    def _shards(self, folder: Path) -> list[tuple[Path, str]]:
        shards = [(folder / name, sha) for name, sha in read_manifest(folder, "encode")["source"].items()]
        missing = [path for path, _ in shards if not path.is_file()]
        if missing:
            raise ValueError(f"{missing[0]} is missing: `encode` was interrupted; give its command again.")
        return shards

    def __getstate__(self) -> dict[str, Any]:  # a loader's worker opens the files itself
        return {key: value for key, value in self.__dict__.items() if key not in ("rows", "instructions")}

    @cached_property
    def rows(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.features / ROWS)

    @cached_property
    def instructions(self) -> dict[str, Any]:
        from safetensors import safe_open

        file = safe_open(str(self.features / INSTRUCTIONS), framework="pt")
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)

    def wordings_sha256(self) -> str:
        return texts_of(self.features / INSTRUCTIONS)

    def instruction(self, draw: Draw) -> Tensor:
        """States [L, W] of the phrasing that was drawn; the first of a table is the task's fixed one."""
        if not draw.dropped.keeps_instruction:
            return self.rows["empty_instruction"]
        if draw.told_everything:
            return self.rows["everything_instruction"]
        if draw.told is not None:
            return self.instructions[draw.told.value][0]
        named = f"{draw.task.value}/{self.shards.subject(draw.sample)}"
        table = self.instructions.get(named) or self.instructions[draw.task.value]
        return table[self.wording(draw, table.get_shape()[0] - 1)]

    def item(self, draw: Draw) -> dict[str, Any]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            features = load(self.shards[draw.sample]["safetensors"])
        except SafetensorError as error:
            raise ValueError(f"its features are damaged ({error})") from error
        item: dict[str, Any] = {"image": features["image"] if draw.dropped.keeps_image else self.rows["zero_image"]}
        keeps_prompt = draw.dropped.keeps_instruction  # what the projector reads of the prompt goes with it
        item["text"] = features["text"] if draw.dropped.keeps_text else self.rows["empty_text"]
        if "pooled" in features:
            item["pooled"] = features["pooled"] if draw.dropped.keeps_pooled else self.rows["empty_pooled"]
        prompt = "prompt" if "prompt" in features else "text"
        item["prompt"] = features[prompt] if keeps_prompt else self.rows[f"empty_{prompt}"]
        item["instruction"] = self.instruction(draw)
        eps, item["noise"] = draw.noise(features["latent_mean"].shape)
        item["latents"] = features["latent_mean"] + features["latent_deviation"] * eps
        return item


class RawSource(Source):
    """Raw shards: items hold pixels and words, and `encode_batch` runs the encoders on a batch of them."""

    def __init__(
        self,
        folders: Sequence[Path],
        split: str,
        tally: Tally,
        preprocess: Any,
        resolution: int,
        phrases: Mapping[Task, Sequence[str]],
        fixed_share: float = 0.0,
        channels: int = 4,
    ) -> None:
        self.channels = channels
        self.preprocess, self.resolution, self.phrases = preprocess, resolution, phrases
        super().__init__(folders, split, tally, fixed_share)

    def wordings_sha256(self) -> str:
        return hash_of(words for task in self.by_task for words in table(task, self.phrases))

    def instruction(self, draw: Draw) -> str:
        if not draw.dropped.keeps_instruction:
            return ""
        if draw.told_everything:
            return EVERYTHING_ROW
        if draw.told is not None:
            return phrase(draw.told)
        words = table(draw.task, self.phrases)
        number = self.wording(draw, len(words) - 1)
        return about(words[number], draw.task, self.shards.subject(draw.sample))

    def item(self, draw: Draw) -> dict[str, Any]:
        sample = Sample.from_members(self.shards[draw.sample])
        condition, target = sample.pictures()
        pixels = self.preprocess(picture_tensor(condition))[0]
        shape = (self.channels, self.resolution // 8, self.resolution // 8)
        eps, noise = draw.noise(shape)
        return {
            "target_pixels": target_pixels(target, self.resolution),
            "condition_pixels": pixels if draw.dropped.keeps_image else torch.zeros_like(pixels),
            "text": sample.prompt if draw.dropped.keeps_text else "",
            "pooled": sample.prompt if draw.dropped.keeps_pooled else "",
            "prompt": sample.prompt if draw.dropped.keeps_instruction else "",
            "instruction": self.instruction(draw),
            "latent_noise": eps,
            "noise": noise,
        }


def encode_batch(encoders: Encoders, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of `RawSource` -> the same batch as `FeatureSource` gives it."""
    raw = ("target_pixels", "condition_pixels", "text", "pooled", "prompt")
    rest = {name: value for name, value in batch.items() if name not in raw}
    eps = rest.pop("latent_noise")
    with record_function("autoencoder"):
        mean, deviation = encoders.base.latent_distribution(batch["target_pixels"].to(encoders.base.device))
    prompts = [batch["text"], batch["pooled"], batch["prompt"]]
    texts = sorted({text for part in prompts for text in part})  # each is encoded once
    with record_function("text encoder"):
        states = encoders.text_features(texts)
    text, pooled, prompt = ([texts.index(text) for text in part] for part in prompts)
    rest |= {"text": states["text"][text], "prompt": states.get("prompt", states["text"])[prompt]}
    if "pooled" in states:
        rest["pooled"] = states["pooled"][pooled]
    with record_function("instruction encoder"):
        rest["instruction"] = encoders.instruction_states(batch["instruction"])
    with record_function("image encoder"):
        rest["image"] = encoders.image_states(batch["condition_pixels"])
    return {**rest, "latents": mean + deviation * eps.to(mean.device)}
