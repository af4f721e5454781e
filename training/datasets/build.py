"""`build`: a source dataset -> shards of samples and a manifest; goes on where it stopped, alone or on many ranks."""

import errno
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

from PIL import Image
from pydantic import Field
from tqdm import tqdm
from training.datasets.describe import describe_picture
from training.datasets.endpoint import Endpoint
from training.datasets.ledger import (
    PLAN,
    Block,
    Contents,
    blocks_of,
    claim,
    claim_models,
    finish_block,
    finished,
    plan_hash,
    skipped_of,
    write_manifest,
)
from training.datasets.sample import Sample, encode_picture, picture_size
from training.datasets.shards import MANIFEST, Tally, write_shard
from training.datasets.sources.builder import Item, chance
from training.datasets.sources.composition import Composition
from training.datasets.sources.face import Face
from training.datasets.sources.files import shrunk
from training.datasets.sources.folders import LeftOut, LeftOutCount
from training.datasets.sources.object import Object
from training.datasets.sources.own import Own
from training.datasets.sources.replication import Replication
from training.datasets.sources.style import Style
from training.datasets.splits import choose
from training.datasets.targets.settings import TargetMaker
from training.datasets.twins import picture_hash, remove_twins
from training.files import ranks
from training.held import defaults_of, paths_of
from training.settings import Settings

logger = logging.getLogger("ipadapter_instruct")

# Settings under which the same samples come out, so that a build may be resumed with other ones.
FREE_SETTINGS = {
    "out": True,
    "max_skipped": True,
    "threads": True,
    "source": {"targets": {"batch_size": True}},
    "endpoint": set(Endpoint.model_fields) - {"model", "temperature", "picture_side"},
}


class BuildConfig(Settings):
    """Where samples come from, and how they are kept."""

    source: Annotated[Replication | Style | Object | Composition | Face | Own, Field(discriminator="kind")]
    """The source dataset and its files."""
    out: Path
    """Folder for the shards and their manifest."""
    limit: int | None = Field(None, ge=1)
    """At most this many samples, taken at random, those that validate among them; of tables by row groups."""
    validation: int = Field(1000, ge=0)
    """Samples held out for validation; of a small source a tenth."""
    prompts: Literal["source", "endpoint"] = "source"
    """Prompts as they come with the source, or from an endpoint, to which the pictures are sent."""
    endpoint: Endpoint = Endpoint()
    """The endpoint that writes prompts."""
    size: int = Field(512, ge=0)
    """Pictures are shrunk to a short side of this many pixels and kept as JPEG; 0 keeps the source's bytes."""
    smallest_side: int = Field(0, ge=0)
    """A sample is left out, counted and named, where a picture of its source has a shorter side than this in pixels."""
    samples_per_shard: int = Field(500, ge=1)
    """Samples in a shard, which is also what an interruption can cost at most."""
    max_skipped: float = Field(0.05, ge=0, le=1)
    """Share of samples that may be bad and skipped before the build fails."""
    seed: int = 0
    """Seed of every random choice."""
    threads: int = Field(8, ge=1)
    """Pictures read, or prompts asked for, at once in each process."""


@dataclass(frozen=True)
class Prepared:
    """An item's sample, what its generated target follows, and the hashes of the source's pictures.

    Or, in place of the sample, what is wrong with the item, or why it is left out.
    """

    item: Item
    sample: Sample | str | LeftOut
    guide: Image.Image | None = None
    hashes: Sequence[str] = ()


def run(config: BuildConfig, maker: TargetMaker | None = None) -> None:
    """Build this rank's share of the shards; the rank that finishes last writes the manifest.

    Args:
        maker: makes generated targets; by default the models that the source's settings name.

    Raises:
        ValueError: the source is not what it should be, too much of it is bad, the settings differ from those of the
            build that is resumed, or the disk is full.
    """
    rank, world = ranks()
    left_out = LeftOutCount()
    splits = choose(config.source.plan(config.seed), config.validation, config.limit, config.seed, left_out)
    if rank == 0 and left_out.counts:
        logger.warning(f"Of {config.source.kind}: {left_out}.")
    blocks = list(blocks_of(splits, config.samples_per_shard))
    settings = config.model_dump(mode="json", exclude=FREE_SETTINGS) | {PLAN: plan_hash(splits)}
    if config.prompts == "source":
        del settings["endpoint"]
        if rank == 0 and config.source.kind == "style":
            _warn_of_bare_styles([item for split in splits.values() for item in split])
    try:
        defaults = defaults_of(BuildConfig) | {"source": defaults_of(type(config.source))}
        # Sources and models may have moved: the plan, and the models' fingerprints, say whether they are the same.
        claim(config.out, settings, defaults, [f"source.{name}" for name in paths_of(config.source)])
        # All items count, so that a build ends early only when it is sure to fail.
        tally = Tally(config.max_skipped, seen=sum(len(block.items) for block in blocks))
        # Neighbours to one rank, so that few row groups of a table are read by two.
        share = blocks[len(blocks) * rank // world : len(blocks) * (rank + 1) // world]
        _build(config, share, maker, tally, rank)
        found = [finished(config.out, block) for block in blocks]
        summaries = [summary for summary in found if summary is not None]
        if len(summaries) < len(blocks):
            logger.info(f"Rank {rank} of {world} is done; the last one to finish writes {config.out / MANIFEST}.")
            return
        summaries = remove_twins(config.out, blocks, summaries)
        kind = config.source.kind
        print(write_manifest(config.out, kind, settings, blocks, summaries, config.max_skipped, left_out))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"The disk that holds {config.out} is full; make room and give the same command again, "
            "which goes on with the first shard that is not finished."
        ) from error


def _warn_of_bare_styles(items: list[Item]) -> None:
    bare = sum(not item.condition_prompt for item in items)
    if bare:
        logger.warning(
            f"{bare} of {len(items)} style samples have no caption of their picture: from these InstantStyle subtracts "
            "no content, and CLIP-S cannot be scored; name a caption column, or have them described by "
            "--prompts endpoint."
        )


def _build(config: BuildConfig, blocks: list[Block], maker: TargetMaker | None, tally: Tally, rank: int) -> None:
    """Make the shards that are not there yet."""
    waiting = []
    for block in blocks:
        done = finished(config.out, block)
        if done is None:
            waiting.append(block)
        else:
            tally.skipped += skipped_of(done)
    if waiting and maker is None and config.source.generated is not None:
        from training.datasets.targets.makers import target_maker  # imports torch and diffusers

        models = target_maker(config.source.generated)
        claim_models(config.out, models.identities())
        maker = models
    total, left = (sum(len(block.items) for block in some) for some in (blocks, waiting))
    description = f"rank {rank}: building {config.source.kind}"
    with (
        tqdm(total=total, initial=total - left, desc=description, unit="sample") as bar,
        ThreadPoolExecutor(config.threads) as pool,
    ):
        try:
            for block in waiting:
                _build_block(config, block, maker, tally, _prepared(config, block.items, pool, bar))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _build_block(
    config: BuildConfig, block: Block, maker: TargetMaker | None, tally: Tally, prepared: Iterator[Prepared]
) -> None:
    """Write one shard, and beside it what it holds: only then is it finished."""
    path = config.out / f"{block.name}.tar"
    contents = Contents()

    def good() -> Iterator[tuple[Sample, Image.Image | None]]:
        for made in prepared:
            if isinstance(made.sample, Sample):
                key = f"{block.name}-{len(contents.pictures):05d}"
                contents.pictures.append([key, made.item.group, *made.hashes])
                yield made.sample, made.guide
            elif isinstance(made.sample, LeftOut):
                contents.left_out.append(made.sample)
            else:
                contents.skipped.append((made.item.source_id, made.sample))
                tally.skipped.append(contents.skipped[-1])
                if len(tally.skipped) >= 20:
                    tally.check()

    def members() -> Iterator[tuple[str, dict[str, bytes]]]:
        samples = (sample for sample, _ in good())
        if config.source.generated is not None:
            assert maker is not None
            samples = _with_targets(config, good(), maker, config.source.generated.batch_size)
        for number, sample in enumerate(samples):
            contents.tasks[sample.task.value] += 1
            yield contents.pictures[number][0], sample.members()
        tally.check()  # before the shard counts as finished, so that it is made again from a mended source

    write_shard(path, members())
    finish_block(config.out, block, contents)


def _prepared(config: BuildConfig, items: list[Item], pool: ThreadPoolExecutor, bar: tqdm) -> Iterator[Prepared]:
    """Every item's sample, in order; only a few are made ahead, since pictures take memory."""
    ahead: deque[Future[Prepared]] = deque()
    for number, item in enumerate(items, start=1):
        ahead.append(pool.submit(_prepare, config, item))
        while ahead and (len(ahead) >= 4 * config.threads or number == len(items)):
            yield ahead.popleft().result()
            bar.update()


def _prepare(config: BuildConfig, item: Item) -> Prepared:
    """The item with its sample and what a generated target follows, or with why it is skipped."""
    try:
        pictures = item.read()
        if any(min(picture_size(content)) < config.smallest_side for content in pictures if content):
            return Prepared(item, LeftOut(item.source_id, f"a short side is under {config.smallest_side} pixels"))
        sample = config.source.make(item, pictures, config.size)
        guide = config.source.guide(sample) if config.source.generated else None
    except ValueError as error:
        return Prepared(item, str(error))
    if config.prompts == "endpoint":  # which may stop the run by a ValueError
        text = describe_picture(config.endpoint, sample.target or sample.condition, sample.subject)
        if text is None:
            return Prepared(item, "the endpoint gave no prompt")
        sample = config.source.described(sample, text)
    if not sample.prompt:
        return Prepared(item, "it has no prompt")
    hashes = {picture_hash(content): None for content in pictures if content is not None}
    return Prepared(item, sample, guide, list(hashes))


def _with_targets(
    config: BuildConfig, made: Iterator[tuple[Sample, Image.Image | None]], maker: TargetMaker, batch_size: int
) -> Iterator[Sample]:
    """Samples with their generated targets; a sample's seed comes from its id, so that a rerun makes the same."""
    while batch := list(islice(made, batch_size)):
        samples = [sample for sample, _ in batch]
        pictures = maker(
            [guide for _, guide in batch if guide is not None],
            [sample.prompt for sample in samples],
            [chance(config.seed, "target", sample.source_id) for sample in samples],
            [sample.condition_prompt for sample in samples],
        )
        for sample, picture in zip(samples, pictures, strict=True):
            yield replace(sample, target=encode_picture(shrunk(picture.convert("RGB"), config.size)))
