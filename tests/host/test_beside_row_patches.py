"""Beside patches that repeat or drop rows, keep a list of them, or read the negative among them.

Each stands for a pack's kind, written anew; `beside.py` tells what is right there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bench import CFG, Bench, Row, application, assert_differs, assert_same, random, sites, slots, tokens
from beside import ORDERS, SCALES, Patch, check, in_order, sampled

ATTN2 = [("input", 1), ("output", 0), ("output", 1)]


def regional_prompts(bench: Bench, keeps_list: bool, times: int = 3) -> Patch:
    """Attention couple: each row that is not the negative's is asked once a region, each with the region's text."""
    texts = [bench.text(prompt)[0][0] for prompt in ("a dog", "a red house", "a boat")[: times - 1]]

    def repeat(q: Any, k: Any, v: Any, options: dict) -> tuple:
        shown, rows = options["cond_or_uncond"], []
        for number, query, key in zip(list(shown), q.chunk(len(shown)), k.chunk(len(shown)), strict=True):
            rows.append((number, query, key))
            if number != 1:
                rows += [(number, query, text.expand(len(query), -1, -1)) for text in texts]
        if keeps_list:
            shown[:] = [number for number, *_ in rows]
        queries, keys = (torch.cat([row[i] for row in rows]) for i in (1, 2))
        return queries, keys, keys

    def unite(out: torch.Tensor, options: dict) -> torch.Tensor:
        shown, height, united = options["cond_or_uncond"], options["activations_shape"][-2], []
        if keeps_list:
            told = [number for i, number in enumerate(shown) if number == 1 or i == shown.index(number)]
            shown[:] = told
        rows = list(out.chunk(sum(1 if number == 1 else times for number in shown)))
        for number in shown:
            some = torch.stack([rows.pop(0) for _ in range(1 if number == 1 else times)])
            if number == 1:
                united.append(some[0])
                continue
            lines = torch.arange(height).repeat_interleave(out.shape[1] // height) * times // height
            own = torch.stack([lines == i for i in range(times)]).view(times, 1, -1, 1)
            united.append((some * own).sum(0))
        return torch.cat(united)

    def patch(model: Any) -> Any:
        clone = model.clone()
        clone.set_model_attn2_patch(repeat)
        clone.set_model_attn2_output_patch(unite)
        return clone

    return patch


def regional_oracle(bench: Bench, each: Any, row: Any, times: int = 3) -> torch.Tensor:
    """The positive of regional prompts evaluated alone: one row, its tokens forced on every region."""
    forced = application.replace(each, tokens=dict.fromkeys(Row, each.tokens[row]), three_way=None)
    return bench.predict(bench.positive, model=regional_prompts(bench, False, times)(bench.apply(forced)))


@pytest.mark.parametrize("keeps_list", [True, False])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("apart", [False, True])
def test_regional_prompts(
    bench: Bench, order: str, keeps_list: bool, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if apart:
        monkeypatch.setattr(type(bench.model.model), "memory_required", lambda *args, **kwargs: 1e18)
    patch = regional_prompts(bench, keeps_list)
    each = bench.application()
    negative = bench.predict(bench.negative, {each: Row.UNCOND})
    positive = regional_oracle(bench, each, Row.FULL)
    assert_same(sampled(bench, in_order(bench, order, patch, each)), negative + CFG * (positive - negative), 1e-4)
    assert_differs(positive, bench.predict(bench.positive, {each: Row.FULL}))
    for scales in SCALES:
        check(bench, order, patch, scales)


def test_regional_prompts_with_a_picture_and_a_mask_for_each_latent(bench: Bench) -> None:
    masks = torch.stack([torch.ones(64, 64).tril(), torch.ones(64, 64).triu()])
    each = bench.application(tokens=tokens(5, count=2), mask=masks, three_way=SCALES[0])
    model = in_order(bench, "after", regional_prompts(bench, True), each)
    x = random(2, 4, 8, 8)
    both = sampled(bench, model, x=x)
    for i in range(2):
        one = {row: t[i : i + 1] for row, t in each.tokens.items()}
        alone = bench.application(tokens=one, mask=masks[i : i + 1], three_way=SCALES[0])
        model = in_order(bench, "after", regional_prompts(bench, True), alone)
        assert_same(both[i : i + 1], sampled(bench, model, x=x[i : i + 1]), 1e-4)


def guidance_in_the_slot(bench: Bench) -> Patch:
    """Normalised attention guidance by a pack: the positive's attention moves away from a negative of the pack's own,
    in rows that it counts; it wraps what sits in the slot."""
    text = bench.text("ugly")[0][0]

    def patch(model: Any) -> Any:
        clone = model.clone()
        replacements = clone.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
        found = sites.sites(clone.model.diffusion_model)
        for slot in found:
            layer = dict(zip(ATTN2, _attentions(clone), strict=True))[slot.block]
            key, value = layer.to_k(text), layer.to_v(text)

            def replace(q: Any, k: Any, v: Any, options: dict, key: Any = key, value: Any = value, inner: Any = None):
                out = (inner or slots.text_attention)(q, k, v, options)
                shown = options["cond_or_uncond"]
                if 0 not in shown:
                    return out
                rows, queries = list(out.chunk(len(shown))), q.chunk(len(shown))
                for i in range(shown.index(0), len(shown)):  # it takes for granted that positives come last
                    size = len(queries[i])
                    away = slots.text_attention(
                        queries[i], key.expand(size, -1, -1), value.expand(size, -1, -1), options
                    )
                    rows[i] = rows[i] + 0.7 * (rows[i] - away)
                return torch.cat(rows)

            before = replacements.get(slot.block)
            clone.set_model_attn2_replace(
                lambda q, k, v, options, replace=replace, before=before: replace(q, k, v, options, inner=before),
                *slot.block,
                slot.index,
            )
        return clone

    return patch


def _attentions(model: Any) -> list:
    return [layer.attn2 for layer in model.model.diffusion_model.modules() if hasattr(layer, "attn2")]


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("order", ORDERS)
def test_attention_guidance_in_the_slot(bench: Bench, order: str, scales: Any) -> None:
    check(bench, order, guidance_in_the_slot(bench), scales)


def guidance_of_the_output(bench: Bench) -> Patch:
    """The host's own kind: reads the negative row of the same call in the self-attention's output."""

    def away(out: torch.Tensor, options: dict) -> torch.Tensor:
        shown = options["cond_or_uncond"]
        if not {0, 1} <= set(shown):
            return out
        rows = list(out.chunk(len(shown)))
        positive, negative = shown.index(0), shown.index(1)
        rows[positive] = rows[positive] + 0.7 * (rows[positive] - rows[negative])
        return torch.cat(rows)

    def patch(model: Any) -> Any:
        clone = model.clone()
        clone.set_model_attn1_output_patch(away)
        clone.model_options["disable_cfg1_optimization"] = True
        return clone

    return patch


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("order", ORDERS)
def test_attention_guidance_that_reads_the_negative_row(bench: Bench, order: str, scales: Any) -> None:
    check(bench, order, guidance_of_the_output(bench), scales)


def windows_of_a_pack(bench: Bench) -> Patch:
    """AnimateDiff's context windows: the lists' conditionings are cut to each part of the batch and the parts put
    together, around the evaluation of a step."""

    def cut(conds: list | None, part: list[int], length: int) -> list | None:
        def narrowed(value: Any) -> Any:
            if hasattr(value, "cond") and len(value.cond) == length:
                return value._copy_with(value.cond[part])
            return value

        if conds is None:
            return None
        return [c | {"model_conds": {k: narrowed(v) for k, v in c["model_conds"].items()}} for c in conds]

    def in_parts(executor: Any, model: Any, conds: list, x: Any, timestep: Any, model_options: dict) -> list:
        out = [torch.zeros_like(x) for _ in conds]
        for part in ([0, 1], [2, 3]):
            told = model_options["transformer_options"] | {"ad_params": {"sub_idxs": part, "full_length": len(x)}}
            lists = [cut(some, part, len(x)) for some in conds]
            options = model_options | {"transformer_options": told}
            for i, found in enumerate(executor(model, lists, x[part], timestep[part], options)):
                out[i][part] = found
        return out

    def patch(model: Any) -> Any:
        clone = model.clone()
        clone.add_wrapper_with_key("calc_cond_batch", "windows", in_parts)
        return clone

    return patch


@pytest.mark.parametrize("scales", [None, *SCALES])
@pytest.mark.parametrize("order", ORDERS)
def test_windows_of_a_pack(bench: Bench, order: str, scales: Any) -> None:
    """Each latent has its picture and its prompts, which the windows cut out."""
    each = bench.application(tokens=tokens(5, count=4), three_way=scales)
    words = [("a cat", "blurry"), ("a dog", "dark"), ("a boat", "ugly"), ("a house", "red")]
    prompts = [[[torch.cat([bench.text(pair[i])[0][0] for pair in words]), {}]] for i in (0, 1)]
    lists = {"positive": prompts[0], "negative": prompts[1]}
    x = random(4, 4, 8, 8)
    ours = sampled(bench, in_order(bench, order, windows_of_a_pack(bench), each), x=x, **lists)
    assert_same(ours, sampled(bench, bench.apply(each), x=x, **lists), 1e-4)
    for i, (positive, negative) in enumerate(words):
        one = {row: t[i : i + 1] for row, t in each.tokens.items()}
        alone = bench.apply(bench.application(tokens=one, three_way=scales))
        texts = {"positive": bench.text(positive), "negative": bench.text(negative)}
        assert_same(ours[i : i + 1], sampled(bench, alone, x=x[i : i + 1], **texts), 1e-4)
