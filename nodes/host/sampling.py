"""What happens while a picture is sampled: wrappers that the host calls at the start, around each
evaluation of the conditionings, and around each call of the model. All are free functions without state."""

from collections.abc import Callable
from typing import Any

import comfy.samplers
from torch import Tensor

from ...ipadapter_instruct_core.guidance import Row, three_way_coefficients, three_way_correction
from .application import CHAIN, Application, ThreeWay
from .run import RUN, Kept, SamplingRun
from .slots import CALL

ACTIVE = "ipadapter_instruct_active"


def start_run(executor: Callable, guider: Any, sigmas: Tensor, extra_args: dict, *args: Any, **kwargs: Any) -> Any:
    """Around the sampler: conditionings are resolved and models loaded, so the run's state is made here."""
    options = extra_args["model_options"]["transformer_options"]
    noise = args[1] if len(args) > 1 else kwargs["noise"]  # (callback, noise, latent_image, ...)
    options[RUN] = SamplingRun(guider, options[CHAIN], noise)
    try:
        return executor(guider, sigmas, extra_args, *args, **kwargs)
    finally:
        del options[RUN]


def evaluate_conds(
    executor: Callable, model: Any, conds: list, x: Tensor, timestep: Tensor, model_options: dict
) -> list[Tensor]:
    """Around the evaluation of a step's conditionings: adds the rows of three-way guidance."""
    options = model_options["transformer_options"]
    run: SamplingRun | None = options.get(RUN)
    if run is None:
        return executor(model, conds, x, timestep, model_options)
    active = run.active(timestep)
    model_options = model_options | {"transformer_options": options | {ACTIVE: active}}
    scales = run.scales(active)
    places = _places(run, conds) if scales is not None else None
    if scales is None or places is None:
        return executor(model, conds, x, timestep, model_options)
    return _evaluate_three_way(executor, run, scales, places, (model, conds, x, timestep, model_options))


def _places(run: SamplingRun, conds: list) -> dict[Row, int] | None:
    """Where a call holds the guider's two lists, told by their rows; None when it holds anything else."""
    rows = [run.cells[c[0]["uuid"]].row if c and c[0].get("uuid") in run.cells else None for c in conds]
    return {row: i for i, row in enumerate(rows)} if set(rows) == {Row.FULL, Row.UNCOND} and len(rows) == 2 else None


def _evaluate_three_way(
    executor: Callable, run: SamplingRun, scales: ThreeWay, places: dict[Row, int], arguments: tuple
) -> list[Tensor]:
    model, conds, x, timestep, model_options = arguments
    text_scale = float(getattr(run.guider, "cfg", 1.0))
    factors = three_way_coefficients(text_scale, scales.instruct_scale, scales.image_scale)
    windowed = model_options["transformer_options"].get("context_window") is not None
    lists = list(conds)
    if not (windowed or _others_read_predictions(model_options)):
        # A row that counts for nothing is not evaluated, unless someone else looks at it.
        for row, place in places.items():
            if factors[row] == 0.0:
                lists[place] = None
    extra = [row for row in (Row.EVERYTHING, Row.IMAGE) if factors[row] != 0.0]
    run.places = places
    out = executor(model, lists + [run.derived[row] for row in extra], x, timestep, model_options)
    predictions = dict(zip(extra, out[2:], strict=True))
    for row, stand_in in ((Row.UNCOND, Row.IMAGE), (Row.FULL, Row.EVERYTHING)):
        place = places[row]
        if lists[place] is None:
            # The sampler's own formula then gives three-way's result, with nothing of this row in it.
            out[place] = predictions.get(stand_in, out[1 - place])
        predictions[row] = out[place]
    if windowed:
        return _fold(predictions, places, text_scale, scales)
    run.kept = Kept(scales, {row: predictions[row] for row in extra})
    return list(out[:2])


def _others_read_predictions(model_options: dict) -> bool:
    others = [fn for fn in model_options.get("sampler_post_cfg_function", []) if fn is not correct_guidance]
    return bool(others or model_options.get("sampler_pre_cfg_function") or model_options.get("sampler_cfg_function"))


def _fold(predictions: dict[Row, Tensor], places: dict[Row, int], text_scale: float, scales: ThreeWay) -> list[Tensor]:
    """Inside context windows, the host blends only what is returned, so the correction goes in there: such
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


def correct_guidance(args: dict[str, Any]) -> Tensor:
    """After the sampler's own guidance: adds what three-way differs by, at the cfg that was really used."""
    options = args["model_options"]["transformer_options"]
    run: SamplingRun | None = options.get(RUN)
    if run is None or run.kept is None:
        return args["denoised"]
    (scales, kept), run.kept = run.kept, None
    text_scale = float(args["cond_scale"])
    needed = {Row.EVERYTHING: scales.instruct_scale, Row.IMAGE: scales.image_scale}
    missing = [row for row, scale in needed.items() if scale != text_scale and row not in kept]
    if missing:  # another patch changed the cfg after the rows were chosen
        lists = [run.derived[row] for row in missing]
        found = comfy.samplers.calc_cond_batch(
            args["model"], lists, args["input"], args["sigma"], args["model_options"]
        )
        kept = kept | dict(zip(missing, found, strict=True))
    predictions = {Row.FULL: args["cond_denoised"], Row.UNCOND: args["uncond_denoised"], **kept}
    return args["denoised"] + three_way_correction(predictions, text_scale, scales.instruct_scale, scales.image_scale)


def call_model(
    executor: Any,
    x: Tensor,
    t: Tensor,
    c_concat: Tensor | None = None,
    c_crossattn: Tensor | None = None,
    control: Any = None,
    transformer_options: dict[str, Any] = {},
    **kwargs: Any,
) -> Tensor:
    """Around the model: tells the slots which rows this batch holds."""
    run: SamplingRun | None = transformer_options.get(RUN)
    if run is not None:
        model = executor.class_obj
        dtype = model.manual_cast_dtype or model.get_dtype()
        active: frozenset[Application] = transformer_options.get(ACTIVE, frozenset(run.chain.applications))
        transformer_options = transformer_options | {CALL: run.call(transformer_options, x, dtype, active)}
    return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
