"""`export`: a run's checkpoint -> the file that the nodes load."""

import json
import logging
from pathlib import Path

from ipadapter_instruct_core.checkpoint import check_target, load, save
from training.settings import Settings
from training.train import checkpoints
from training.train.settings import FREE_SETTINGS
from training.train.state import ADAPTER, AVERAGE

log = logging.getLogger("ipadapter_instruct")


class ExportConfig(Settings):
    """Settings of `python -m training export`."""

    run: Path
    """Folder of the run."""
    out: Path
    """File to write, .safetensors or .bin, in the released layout; for ComfyUI, in models/ipadapter_instruct."""
    step: int | None = None
    """Step of the checkpoint; by default the last good one."""
    averaged: bool = True
    """Take the moving average where the run kept one."""
    half: bool = False
    """Write float16, half the size."""


def run(config: ExportConfig) -> None:
    """Raises ValueError where there is no good checkpoint, or the file cannot be written there."""
    config.out.parent.mkdir(parents=True, exist_ok=True)
    check_target(config.out)
    folder = config.run / "checkpoints"
    checkpoint = checkpoints.newest(folder) if config.step is None else checkpoints.path_of(folder, config.step)
    if checkpoint is None or not checkpoints.is_whole(checkpoint):
        raise ValueError(
            f"{config.run} holds no whole checkpoint{'' if config.step is None else f' of step {config.step}'}."
        )
    averaged = config.averaged and (checkpoint / AVERAGE).is_file()
    adapter = load(checkpoint / (AVERAGE if averaged else ADAPTER))
    if config.half:
        adapter.half()
    state = checkpoints.read_state(checkpoint)
    tasks = [task for task, weight in state["config"]["tasks"].items() if weight > 0]
    settings = {name: value for name, value in state["config"].items() if name not in FREE_SETTINGS}
    made_by = {"settings": json.dumps(settings), "data_sha256": state.get("data_sha256", "")}
    save(config.out, adapter, steps=str(state["step"]), tasks=",".join(tasks) or "all", **made_by)
    log.info("export: %s, step %d%s", config.out, state["step"], ", averaged" if averaged else "")
