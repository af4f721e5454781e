"""A reference: adapter tokens of pictures under an instruction, to be combined and kept in a file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import check_numbers, read, write
from .guidance import Row
from .tasks import Task

FORMAT = "ipadapter-instruct-reference"
SHARES = "shares"
FACTS = ("adapter", "adapter_sha256", "task", "wording", "pictures")


@dataclass(frozen=True, eq=False)
class EncodedReference:
    """What Apply needs of a picture, without the towers that it was encoded by.

    Attributes:
        tokens: adapter tokens [N, T, O] of every row; N is 1, or the number of pictures where each belongs to one
            latent of the batch.
        task, wording: of its instruction; the task decides on strength and guidance.
        pictures: how many it was made of.
        adapter, adapter_sha256: the name and the weights' hash of the adapter that it was made with.
        shares: [T], adding up to one: how much of the attention goes to each token where all fit the query alike.
            None where none is preferred.
    """

    tokens: Mapping[Row, Tensor]
    task: Task
    wording: str
    pictures: int
    adapter: str
    adapter_sha256: str
    shares: Tensor | None = None

    @property
    def length(self) -> int:
        return self.tokens[Row.FULL].shape[1]

    def repeated(self, count: int, length: int) -> "EncodedReference":
        """For ``count`` latents, and ``length`` tokens long: attention to repeated tokens is attention to them once."""
        times = length // self.length
        tokens = {
            row: each.repeat(count // len(each), times, 1) if (count, length) != tuple(each.shape[:2]) else each
            for row, each in self.tokens.items()
        }
        return replace(self, tokens=tokens, shares=None if self.shares is None else self.shares.repeat(times) / times)


def combine(references: Sequence[EncodedReference], weights: Sequence[float], mean: bool) -> EncodedReference:
    """One reference of several, at one strength; the first decides on the task.

    Args:
        weights: of each, from 0; only their proportions count.
        mean: the weighted mean of their tokens; else side by side, where each is given its share of the attention.

    Raises:
        ValueError: the references belong to different adapters, or the weights give no proportions.
    """
    for each in references[1:]:
        if each.adapter_sha256 != references[0].adapter_sha256:
            raise ValueError(
                f"The references were made with different adapters ({references[0].adapter} and {each.adapter}); "
                "encode all of them with the same Load IPAdapter-Instruct Model."
            )
    if any(not math.isfinite(weight) or weight < 0 for weight in weights) or sum(weights) <= 0:
        told = ", ".join(f"{weight:g}" for weight in weights)
        raise ValueError(
            f"The weights of the references are {told}, which gives no proportions; take weights from 0 on, "
            "at least one of them above 0."
        )
    # The same reference twice is one with both weights: exactly, which sums of rounded numbers are not.
    merged: list[tuple[EncodedReference, float]] = []
    for each, weight in zip(references, weights, strict=True):
        same = next((i for i, (other, _) in enumerate(merged) if _alike(each, other)), None)
        if same is not None:
            merged[same] = merged[same][0], merged[same][1] + weight
        elif weight > 0:
            merged.append((each, weight))
    chosen, proportions = [each for each, _ in merged], [weight / sum(weights) for _, weight in merged]
    if len(chosen) == 1:
        return chosen[0]
    whole = replace(
        chosen[0],
        wording=" + ".join(dict.fromkeys(each.wording for each in chosen)),
        pictures=sum(each.pictures for each in chosen),
    )
    count = math.lcm(*(len(each.tokens[Row.FULL]) for each in chosen))
    count = math.lcm(count, *(len(each.tokens[Row.UNCOND]) for each in chosen))
    return _mean(whole, chosen, proportions, count) if mean else _side_by_side(whole, chosen, proportions, count)


def _alike(one: EncodedReference, other: EncodedReference) -> bool:
    if one is other:
        return True
    alike = torch.equal(_shares(one), _shares(other))
    return alike and all(torch.equal(one.tokens[row], other.tokens[row]) for row in Row)


def _side_by_side(
    whole: EncodedReference, parts: list[EncodedReference], proportions: list[float], count: int
) -> EncodedReference:
    parts = [each.repeated(count, each.length) for each in parts]
    shares = torch.cat([_shares(each) * share for each, share in zip(parts, proportions, strict=True)])
    uniform = torch.allclose(shares, shares[:1], rtol=1e-6, atol=0.0)
    tokens = {row: torch.cat([each.tokens[row] for each in parts], dim=1) for row in Row}
    return replace(whole, tokens=tokens, shares=None if uniform else shares)


def _mean(
    whole: EncodedReference, parts: list[EncodedReference], proportions: list[float], count: int
) -> EncodedReference:
    length = math.lcm(*(each.length for each in parts))
    parts = [each.repeated(count, length) for each in parts]

    def mean(tensors: list[Tensor]) -> Tensor:
        return torch.stack([each * share for each, share in zip(tensors, proportions, strict=True)]).sum(dim=0)

    tokens = {row: mean([each.tokens[row] for each in parts]) for row in Row}
    plain = all(each.shares is None for each in parts)
    return replace(whole, tokens=tokens, shares=None if plain else mean([_shares(each) for each in parts]))


def _shares(reference: EncodedReference) -> Tensor:
    if reference.shares is not None:
        return reference.shares
    return torch.full((reference.length,), 1 / reference.length, device=reference.tokens[Row.FULL].device)


def rows_of(
    reference: EncodedReference, negative: EncodedReference | None = None
) -> tuple[dict[Row, Tensor], dict[Row, Tensor] | None]:
    """What each row attends to: tokens [N, T, O], and what is added to the attention's logits, [1, 1, T], if anything.

    A ``negative`` reference stands in the negative row in place of no picture.
    """
    sources = dict.fromkeys(Row, reference)
    if negative is not None:
        length = math.lcm(reference.length, negative.length)
        kept = reference.repeated(len(reference.tokens[Row.FULL]), length)
        sources = dict.fromkeys(Row, kept) | {Row.UNCOND: negative.repeated(len(negative.tokens[Row.FULL]), length)}
    shown = {row: Row.FULL if negative is not None and row is Row.UNCOND else row for row in Row}
    tokens = {row: source.tokens[shown[row]] for row, source in sources.items()}
    if all(source.shares is None for source in sources.values()):
        return tokens, None
    return tokens, {row: (_shares(source) * source.length).log().view(1, 1, -1) for row, source in sources.items()}


def save(path: Path, reference: EncodedReference) -> None:
    """Write a reference as one ``.safetensors``, its facts readable in the header."""
    state = {row.value: tokens for row, tokens in reference.tokens.items()}
    if reference.shares is not None:
        state[SHARES] = reference.shares
    facts = {name: getattr(reference, name) for name in FACTS} | {"task": reference.task.value}
    write(path, state, {"format": FORMAT, **{name: str(value) for name, value in facts.items()}})


def load(path: Path) -> EncodedReference:
    """Read a reference's file strictly.

    Raises:
        ValueError: one sentence on what is wrong with the file and what to do.
    """
    state, facts = read(path)
    if facts.get("format") != FORMAT:
        raise ValueError(f"{path.name} is not a saved reference; choose a file that Save Reference has written.")
    problem = _problem(state, facts)
    if problem:
        raise ValueError(f"{path.name} is damaged: {problem}; encode the pictures again and save them anew.")
    check_numbers(path.name, state)
    return EncodedReference(
        tokens={row: state[row.value] for row in Row},
        task=Task(facts["task"]),
        wording=facts["wording"],
        pictures=int(facts["pictures"]),
        adapter=facts["adapter"],
        adapter_sha256=facts["adapter_sha256"],
        shares=state.get(SHARES),
    )


def _problem(state: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """What a file of the right kind lacks, in a few words; "" when nothing."""
    lost = [name for name in FACTS if name not in facts]
    lost += [row.value for row in Row if row.value not in state]
    if lost:
        return f"it lacks {lost[0]}"
    surplus = state.keys() - {row.value for row in Row} - {SHARES}
    if surplus:
        return f"{min(surplus)[:80]} is unexpected"
    if facts["task"] not in {task.value for task in Task}:
        return f"its task {facts['task'][:40]!r} is unknown"
    if not (facts["pictures"].isascii() and facts["pictures"].isdigit() and len(facts["pictures"]) < 7):
        return "its number of pictures is none"
    rows = [state[row.value] for row in Row]
    if any(each.ndim != 3 or each.numel() == 0 or each.dtype != torch.float32 for each in rows):
        return "its tokens are not three-dimensional float32"
    counts = {len(each) for each in rows} - {1}
    if len({each.shape[1:] for each in rows}) != 1 or len(counts) > 1:
        return "its rows are of different shapes"
    shares = state.get(SHARES)
    if shares is not None and (shares.shape != rows[0].shape[1:2] or shares.dtype != torch.float32):
        return "its shares are of another number than its tokens"
    return "" if shares is None or bool((shares > 0).all()) else "its shares are not above 0"
