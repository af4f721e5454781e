"""What happens while a picture is sampled: wrappers that the host calls at the start, around each
evaluation of the conditionings, and around each call of the model. All are free functions without state."""

from collections.abc import Callable
from functools import cache
from typing import Any

from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .application import CHAIN, Application
from .others import renew_hints
from .run import RUN, SamplingRun
from .sites import compute_dtype
from .slots import CALL, shared_slots
from .three_way import evaluate_three_way

ACTIVE = "ipadapter_instruct_active"
COMPILED = "torch.compile"  # the host's key of the wrapper that swaps in the compiled model


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
    sigma = cache(lambda: float(timestep[0]))
    active = run.active(sigma)
    model_options = model_options | {"transformer_options": options | {ACTIVE: active}}
    run.wrapped = "model_function_wrapper" in model_options
    run.look_at(conds)

    def evaluate(model: Any, conds: list, *rest: Any) -> list[Tensor]:
        """The rows that really go through the model."""
        run.look_at(conds)
        rows = sum(map(len, filter(None, conds)))
        if rows != run.rows:
            renew_hints(conds)
            run.rows = rows
        return executor(model, conds, *rest)

    scales = run.scales(active)
    if scales is not None:
        return evaluate_three_way(evaluate, run, scales, sigma, (model, conds, x, timestep, model_options))
    run.kept.clear()
    return evaluate(model, conds, x, timestep, model_options)


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
    """Around the model: tells the slots which rows this batch holds.

    Hosts since 0.8 compile a model without regard to what `transformer_options` holds, so that the graph of the bare
    model would serve ours too, and one of ours another: what a graph depends on is told in an argument's name, the
    only thing of an argument that nobody reads to which a compiler holds.
    """
    run: SamplingRun | None = transformer_options.get(RUN)
    if run is not None:
        dtype = compute_dtype(executor.class_obj)
        active: frozenset[Application] = transformer_options.get(ACTIVE, frozenset(run.chain.applications))
        call = run.call(transformer_options, x, dtype, active)
        transformer_options = transformer_options | {CALL: call}
        if COMPILED in transformer_options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, ()):
            kwargs[f"{CALL}_{call.structure}_{shared_slots(transformer_options)}"] = True
    return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
