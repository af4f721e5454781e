"""Three-way guidance under samplers that know only a positive and a negative prediction, and beside other packs.

Two rows are evaluated beside the sampler's two, and what three-way guidance differs by is added to the sampler's own
guidance. Where another pack may meet the added rows they go through the model apart, in calls that hold a negative and
nothing else; where something cannot be followed, simple guidance stays, and the user is told.
"""

from collections.abc import Callable
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ...ipadapter_instruct_core.guidance import Row, three_way_coefficients, three_way_correction
from .application import ThreeWay
from .others import meet_rows, read_predictions
from .run import ADDED, RUN, Alone, Kept, SamplingRun

Sigma = Callable[[], float]
APART = "A sampler or patch evaluates a step's two prompts apart, in its own way: simple guidance is used."
PATIENCE = 3  # evaluations whose guidance we were never asked to correct
UNMOVED = 1e-2  # of what guidance would change: less than that is no guidance
NO_ROOM = ("out of memory", "VRAM grow failed", "VRAM reservation failed")  # of any device; of newer hosts' own memory
PROBLEMS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def evaluate_three_way(
    executor: Callable, run: SamplingRun, scales: ThreeWay, sigma: Sigma, arguments: tuple
) -> list[Tensor]:
    """A call's predictions, after those of the added rows where it holds the guider's two lists."""
    model, conds, x, timestep, model_options = arguments
    places = {run.row_of(some): place for place, some in enumerate(conds)}
    if len(conds) != 2 or places.keys() != {Row.FULL, Row.UNCOND}:
        if len(conds) == 2:
            run.kept.clear()
        out = executor(*arguments)
        own = {row: place for row, place in places.items() if row in (Row.FULL, Row.UNCOND)}
        run.alone |= {row: Alone(scales, conds[place], out[place]) for row, place in own.items()}
        return out
    run.alone.clear()
    text_scale = as_scale(getattr(run.guider, "cfg", 1.0))
    windowed = model_options["transformer_options"].get("context_window") is not None or x.shape != run.shape
    if not _applies(run, scales, text_scale, windowed):
        return executor(*arguments)
    factors = None
    if isinstance(text_scale, float):
        factors = three_way_coefficients(text_scale, scales.instruct_scale, scales.image_scale)
    full, uncond = conds[places[Row.FULL]], conds[places[Row.UNCOND]]
    derived = {row: run.derive(row, uncond, full, sigma) for row in ADDED}
    extra = {row: some for row, some in derived.items() if factors is None or factors[row] != 0.0}
    run.places = places
    met = meet_rows(run.guider.model_patcher, model_options, [*full, *uncond])
    others = met or read_predictions(model_options, correct_guidance) or not _guides_as_the_host(run.guider)
    lists = list(conds)
    if not (others or windowed or factors is None):
        for row, place in places.items():
            if factors[row] == 0.0:  # it counts for nothing, and nobody else looks at it
                lists[place] = None
    if met:
        out, predictions = _evaluate_apart(executor, run, extra, places, arguments)
    else:
        out, predictions = _evaluate_together(executor, run, extra, lists, arguments)
    if predictions is None or run.lost:
        return out
    for row, stand_in in ((Row.UNCOND, Row.IMAGE), (Row.FULL, Row.EVERYTHING)):
        place = places[row]
        if lists[place] is None:
            # The sampler's own formula then gives three-way's result, with nothing of this row in it.
            out[place] = predictions.get(stand_in, out[1 - place])
    pair = out[places[Row.FULL]], out[places[Row.UNCOND]]
    if windowed:
        return _fold(predictions | dict(zip((Row.FULL, Row.UNCOND), pair, strict=True)), places, text_scale, scales)
    run.kept.append(Kept(scales, pair, predictions, derived, others))
    return out


def _applies(run: SamplingRun, scales: ThreeWay, text_scale: float | Tensor | None, windowed: bool) -> bool:
    """Whether three-way guidance can be had in this evaluation."""
    if scales.automatic and isinstance(text_scale, float) and text_scale == 1.0:
        return False
    if windowed and not isinstance(text_scale, float):
        run.warn("Three-way guidance needs one cfg for all in context windows, so simple guidance is used.")
        return False
    if len(run.kept) >= PATIENCE:
        run.warn("This sampler combines its predictions in a way of its own, so simple guidance is used.")
        return False
    return not run.lost


def _guides_as_the_host(guider: Any) -> bool:
    return getattr(type(guider), "predict_noise", None) is comfy.samplers.CFGGuider.predict_noise


def _evaluate_together(
    executor: Callable, run: SamplingRun, extra: dict[Row, list], lists: list, arguments: tuple
) -> tuple[list[Tensor], dict[Row, Tensor] | None]:
    model, conds, *rest = arguments
    try:
        out = executor(model, lists + list(extra.values()), *rest)
    except PROBLEMS as problem:
        _say_why_simple(run, problem)
        return list(executor(*arguments)), None
    return list(out[:2]), dict(zip(extra, out[2:], strict=True))


def _evaluate_apart(
    executor: Callable, run: SamplingRun, extra: dict[Row, list], places: dict[Row, int], arguments: tuple
) -> tuple[list[Tensor], dict[Row, Tensor] | None]:
    """The added rows first: what a patch remembers of a step is then the sampler's own rows."""
    model, conds, *rest = arguments
    predictions = _each_alone(lambda lists: executor(model, lists, *rest), run, extra, places)
    return list(executor(*arguments)), predictions


def _each_alone(
    evaluate: Callable[[list], list[Tensor]], run: SamplingRun, rows: dict[Row, list], places: dict[Row, int]
) -> dict[Row, Tensor] | None:
    """Each row where the host puts a negative; None when another pack's patch cannot do with that."""
    predictions = {}
    try:
        for row, conds in rows.items():
            lists: list = [None, None]
            lists[places[Row.UNCOND]] = conds
            predictions[row] = evaluate(lists)[places[Row.UNCOND]]
    except PROBLEMS as problem:
        _say_why_simple(run, problem)
        return None
    return predictions


def _say_why_simple(run: SamplingRun, problem: Exception) -> None:
    if isinstance(problem, torch.cuda.OutOfMemoryError) or any(words in str(problem) for words in NO_ROOM):
        raise problem  # the host makes room and says what to do
    run.warn(
        "Another patch on this model cannot take part in three-way guidance, so simple guidance is used where "
        f"it cannot ({type(problem).__name__}: {problem})."
    )


def _fold(predictions: dict[Row, Tensor], places: dict[Row, int], text_scale: float, scales: ThreeWay) -> list[Tensor]:
    """Inside context windows, only what is returned is blended, so the correction goes in there: such
    that ``uncond + s (full - uncond)`` of the two gives the three-way result (whichever factor is the larger)."""
    correction = three_way_correction(predictions, text_scale, scales.instruct_scale, scales.image_scale)
    full, uncond = predictions[Row.FULL], predictions[Row.UNCOND]
    if abs(text_scale) >= abs(1.0 - text_scale):
        full = full + correction / text_scale
    else:
        uncond = uncond + correction / (1.0 - text_scale)
    result = [uncond, uncond]
    result[places[Row.FULL]] = full
    return result


def as_scale(value: Any) -> float | Tensor | None:
    """A cfg as other packs give it: a number, a tensor of several (one a latent or frame), or None for neither."""
    if isinstance(value, Tensor) and value.numel() > 1:
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def correct_guidance(args: dict[str, Any]) -> Tensor:
    """After the sampler's own guidance: adds what three-way differs by, at the cfg that was really used."""
    denoised, full, uncond = args["denoised"], args["cond_denoised"], args["uncond_denoised"]
    run: SamplingRun | None = args["model_options"]["transformer_options"].get(RUN)
    if run is None:
        return denoised
    if not run.kept:
        _keep_what_was_evaluated_alone(run, args)
    if not run.kept:
        return denoised
    # Another patch may have evaluated the two lists once more since.
    kept = next((k for k in run.kept if k.pair[0] is full and k.pair[1] is uncond), run.kept[0])
    run.kept.clear()
    text_scale = as_scale(args["cond_scale"])
    if text_scale is None or uncond is None:
        run.warn("The sampler gives no cfg that can be read at some steps, so simple guidance is used in them.")
        return denoised
    if isinstance(text_scale, float) and kept.others:
        text_scale = _scale_that_was_used(args, text_scale)
    if text_scale is None or (kept.scales.automatic and text_scale == 1.0):
        return denoised
    predictions = _with_missing(run, kept, text_scale, args)
    if predictions is None:
        return denoised
    predictions |= {Row.FULL: full, Row.UNCOND: uncond}
    return denoised + three_way_correction(predictions, text_scale, kept.scales.instruct_scale, kept.scales.image_scale)


def _keep_what_was_evaluated_alone(run: SamplingRun, args: dict[str, Any]) -> None:
    """Where another pack evaluates the sampler's two lists in a call each (SkipLayerGuidanceDiTSimple does), the added
    rows are evaluated now."""
    pair = args["cond_denoised"], args["uncond_denoised"]
    full, uncond = run.alone.get(Row.FULL), run.alone.get(Row.UNCOND)
    if full and uncond and full.prediction is pair[0] and uncond.prediction is pair[1]:
        run.places = {Row.FULL: 0, Row.UNCOND: 1}
        derived = {row: run.derive(row, uncond.conds, full.conds, lambda: float(args["sigma"][0])) for row in ADDED}
        run.kept.append(Kept(full.scales, pair, {}, derived, others=True))
    elif run.alone and pair[1] is not None:  # in a way of its own, or a guider holds one of the lists by itself
        run.warn(APART)
    run.alone.clear()


def _scale_that_was_used(args: dict[str, Any], text_scale: float) -> float | Tensor | None:
    """The cfg by which another pack's formula has really guided: a number, one for each latent, or None where the
    negative is left out of the step, so that there is nothing to correct. It costs a read-back, and so is asked only
    where someone else takes part."""
    if text_scale == 1.0:
        return text_scale
    denoised, full, uncond = (args[f"{name}denoised"].flatten(1).float() for name in ("", "cond_", "uncond_"))
    moved, whole = denoised - uncond, full - uncond
    square = whole.square().sum(1)
    used = torch.where(square > 0, (moved * whole).sum(1) / square, 1.0)  # 1: the positive stands for the negative
    is_a_scale = (moved - used[:, None] * whole).norm(dim=1) <= UNMOVED * moved.norm(dim=1)
    used = torch.where(is_a_scale, used, text_scale)
    low, high = torch.stack([used.min(), used.max()]).tolist()
    for known, answer in ((text_scale, text_scale), (1.0, None)):
        if max(abs(low - known), abs(high - known)) <= UNMOVED * abs(text_scale - 1.0):
            return answer
    return used.view(-1, *[1] * (args["denoised"].ndim - 1)).to(args["denoised"])


def _with_missing(
    run: SamplingRun, kept: Kept, text_scale: float | Tensor, args: dict[str, Any]
) -> dict[Row, Tensor] | None:
    """The added rows' predictions; those evaluated now that seemed not to count until another cfg was used."""
    needed = {Row.EVERYTHING: kept.scales.instruct_scale, Row.IMAGE: kept.scales.image_scale}
    missing = {
        row: kept.derived[row]
        for row, scale in needed.items()
        if row not in kept.predictions and (isinstance(text_scale, Tensor) or scale != text_scale)
    }
    found = _each_alone(
        lambda lists: comfy.samplers.calc_cond_batch(
            args["model"], lists, args["input"], args["sigma"], args["model_options"]
        ),
        run,
        missing,
        run.places,
    )
    return None if found is None else kept.predictions | found
