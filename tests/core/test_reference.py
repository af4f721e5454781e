"""References: what combining them does to attention, and files that are whole, damaged or hostile."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ipadapter_instruct_core.attention import image_attention, split_heads
from ipadapter_instruct_core.guidance import Row
from ipadapter_instruct_core.reference import EncodedReference, combine, load, rows_of, save
from ipadapter_instruct_core.tasks import Task
from safetensors.torch import save_file
from torch import Tensor

HEADS, WIDTH = 2, 16


def reference(seed: int, count: int = 1, length: int = 4, adapter: str = "a.bin") -> EncodedReference:
    generator = torch.Generator().manual_seed(seed)
    tokens = {row: torch.randn(count, length, WIDTH, generator=generator) for row in Row}
    return EncodedReference(tokens, Task.STYLE, f"use style {seed}", 1, adapter, f"hash of {adapter}")


def attended(which: EncodedReference, row: Row = Row.FULL, negative: EncodedReference | None = None) -> Tensor:
    """What a query gets of a reference where the keys and the values are its tokens."""
    tokens, bias = rows_of(which, negative)
    queries = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(9))
    keys = split_heads(tokens[row][:1], HEADS)
    return image_attention(queries, keys, keys, None if bias is None else bias[row].unsqueeze(1))


def spelled_out(parts: list[tuple[EncodedReference, float]], row: Row = Row.FULL) -> Tensor:
    """Attention to all tokens, by sums: each exponential counts as often as its reference's weight, over its length."""
    queries = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(9)).double()
    out = []
    for head in range(HEADS):
        part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
        above = below = 0.0
        for each, weight in parts:
            tokens = each.tokens[row][0, :, part].double()
            mass = (queries[0, :, part] @ tokens.T / math.sqrt(WIDTH / HEADS)).exp() * weight / len(tokens)
            above, below = above + mass @ tokens, below + mass.sum(dim=1, keepdim=True)
        out.append(above / below)
    return torch.cat(out, dim=1).unsqueeze(0).float()


A, B, C = reference(1), reference(2, length=12), reference(3)


@pytest.mark.parametrize("row", Row)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.2, 0.7)])
def test_side_by_side_is_attention_to_all_each_with_its_share(weights: tuple[float, float], row: Row) -> None:
    whole = combine([A, B], weights, mean=False)
    torch.testing.assert_close(attended(whole, row), spelled_out([(A, weights[0]), (B, weights[1])], row))
    assert not torch.allclose(attended(whole, row), spelled_out([(A, weights[0]), (B, 2 * weights[1])], row), atol=1e-3)


def test_what_is_combined_again_keeps_its_share() -> None:
    nested = combine([combine([A, B], [1.0, 3.0], mean=False), C], [1.0, 1.0], mean=False)
    torch.testing.assert_close(attended(nested), spelled_out([(A, 0.125), (B, 0.375), (C, 0.5)]))


def test_the_mean_is_of_tokens() -> None:
    whole = combine([A, C], [3.0, 1.0], mean=True)
    for row in Row:
        torch.testing.assert_close(whole.tokens[row], 0.75 * A.tokens[row] + 0.25 * C.tokens[row])
    longer = combine([A, B], [1.0, 1.0], mean=True)
    torch.testing.assert_close(longer.tokens[Row.FULL], (A.tokens[Row.FULL].repeat(1, 3, 1) + B.tokens[Row.FULL]) / 2)


@pytest.mark.parametrize("mean", [True, False])
def test_one_and_equal_ones_are_exactly_the_one(mean: bool) -> None:
    twin = replace(A, tokens={row: tokens.clone() for row, tokens in A.tokens.items()})
    for parts, weights in (([A], [0.3]), ([A, A], [0.3, 1.7]), ([A, twin, A], [1.0, 0.1, 0.7]), ([B, A], [0.0, 1.0])):
        assert rows_same(combine(parts, weights, mean), A)


def rows_same(one: EncodedReference, other: EncodedReference) -> bool:
    (tokens, bias), (others, other_bias) = rows_of(one), rows_of(other)
    return bias is other_bias is None and all(torch.equal(tokens[row], others[row]) for row in Row)


def test_equal_shares_need_no_bias() -> None:
    assert rows_of(combine([A, C], [0.7, 0.7], mean=False))[1] is None
    assert rows_of(combine([A, B], [1.0, 3.0], mean=False))[1] is None  # three times the tokens, three times the weight


def test_pictures_for_each_latent_meet_those_for_all() -> None:
    each = reference(4, count=3)
    whole = combine([A, each], [1.0, 1.0], mean=False)
    assert whole.tokens[Row.FULL].shape == (3, 8, WIDTH)
    torch.testing.assert_close(whole.tokens[Row.FULL][2, :4], A.tokens[Row.FULL][0])
    torch.testing.assert_close(whole.tokens[Row.FULL][2, 4:], each.tokens[Row.FULL][2])


@pytest.mark.parametrize("negative", [C, B, combine([A, C], [1.0, 2.0], mean=False)])
def test_a_negative_stands_in_the_negative_row_alone(negative: EncodedReference) -> None:
    for row in (Row.FULL, Row.EVERYTHING, Row.IMAGE):
        torch.testing.assert_close(attended(A, row, negative), attended(A, row))
    torch.testing.assert_close(attended(A, Row.UNCOND, negative), attended(negative, Row.FULL))
    lengths = {tokens.shape[1] for tokens in rows_of(A, negative)[0].values()}
    assert len(lengths) == 1, "rows of a batch need one length"


def test_what_cannot_be_combined_is_told() -> None:
    with pytest.raises(ValueError, match=r"different adapters \(a.bin and b.bin\)"):
        combine([A, reference(1, adapter="b.bin")], [1.0, 1.0], mean=False)
    for weights in ([0.0, 0.0], [-1.0, 2.0], [math.nan, 1.0], [math.inf, 1.0]):
        with pytest.raises(ValueError, match="gives no proportions"):
            combine([A, B], weights, mean=True)


@pytest.mark.parametrize("which", [A, combine([A, B], [1.0, 2.0], mean=False), reference(5, count=3)])
def test_a_file_gives_back_the_same_bits(tmp_path: Path, which: EncodedReference) -> None:
    save(tmp_path / "r.safetensors", which)
    found = load(tmp_path / "r.safetensors")
    for row in Row:
        assert torch.equal(found.tokens[row], which.tokens[row])
    assert (found.shares is None) == (which.shares is None)
    assert found.shares is None or torch.equal(found.shares, which.shares)
    assert facts(found) == facts(which)


def facts(which: EncodedReference) -> list[object]:
    return [which.task, which.wording, which.pictures, which.adapter, which.adapter_sha256]


def test_its_facts_are_readable_without_torch(tmp_path: Path) -> None:
    save(tmp_path / "r.safetensors", A)
    content = (tmp_path / "r.safetensors").read_bytes()
    told = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    assert told == {
        "format": "ipadapter-instruct-reference",
        "adapter": "a.bin",
        "adapter_sha256": "hash of a.bin",
        "task": "style",
        "wording": "use style 1",
        "pictures": "1",
    }


WHOLE = {row.value: tokens for row, tokens in A.tokens.items()}
TOLD = {"format": "ipadapter-instruct-reference", "adapter": "a", "adapter_sha256": "h", "task": "style"}
TOLD |= {"wording": "w", "pictures": "1"}
DAMAGED = {
    "no reference": ({"latents": torch.zeros(1)}, {}, "not a saved reference"),
    "a row is lost": ({k: v for k, v in WHOLE.items() if k != "image"}, TOLD, "lacks image"),
    "a fact is lost": (WHOLE, {k: v for k, v in TOLD.items() if k != "wording"}, "lacks wording"),
    "surplus": (WHOLE | {"x": torch.zeros(1)}, TOLD, "x is unexpected"),
    "an unknown task": (WHOLE, TOLD | {"task": "hacking"}, "'hacking' is unknown"),
    "a number of pictures": (WHOLE, TOLD | {"pictures": "-1"}, "number of pictures"),
    "another number of pictures": (WHOLE, TOLD | {"pictures": "²"}, "number of pictures"),
    "integers": (WHOLE | {"full": torch.zeros(1, 4, WIDTH, dtype=torch.int64)}, TOLD, "float32"),
    "half": (WHOLE | {"full": torch.zeros(1, 4, WIDTH, dtype=torch.float16)}, TOLD, "float32"),
    "a flat row": (WHOLE | {"full": torch.zeros(4, WIDTH)}, TOLD, "three-dimensional"),
    "nothing": (WHOLE | {"full": torch.zeros(0, 4, WIDTH)}, TOLD, "three-dimensional"),
    "lengths": (WHOLE | {"full": torch.zeros(1, 5, WIDTH)}, TOLD, "different shapes"),
    "counts": (WHOLE | {"full": torch.zeros(2, 4, WIDTH), "image": torch.zeros(3, 4, WIDTH)}, TOLD, "shapes"),
    "NaN": (WHOLE | {"full": torch.full((1, 4, WIDTH), math.nan)}, TOLD, "not numbers"),
    "shares": (WHOLE | {"shares": torch.zeros(4)}, TOLD, "above 0"),
    "NaN shares": (WHOLE | {"shares": torch.full((4,), math.nan)}, TOLD, "above 0"),
    "more shares": (WHOLE | {"shares": torch.ones(5)}, TOLD, "shares"),
}


@pytest.mark.parametrize(("state", "told", "sentence"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_told(tmp_path: Path, state: dict, told: dict, sentence: str) -> None:
    save_file({key: tensor.clone() for key, tensor in state.items()}, tmp_path / "r.safetensors", told)
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path / "r.safetensors")


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x80\x04cos\nsystem\n", bytes(8) + b"{}", b"\xff" * 100])
def test_what_is_no_safetensors_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"r\.safetensors is"):
        load(tmp_path / "r.safetensors")
