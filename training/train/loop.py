"""`train`: the loop, from features or raw shards to checkpoints, on one process or many."""

import json
import logging
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from ipadapter_instruct_core.adapter import Adapter
from torch import Tensor
from tqdm import tqdm
from training.datasets.shards import Tally, write_json
from training.features.draws import Draws
from training.features.stored import encode_batch
from training.frozen.unet import prepare_unet
from training.train import checkpoints
from training.train.adapter import TrainedAdapter, losses, start_adapter
from training.train.batches import Slots, loader
from training.train.data import instruction_encoder, load_data, state_widths
from training.train.log import VALIDATION, RunLog
from training.train.settings import FREE_SETTINGS, TrainConfig
from training.train.state import RunState
from training.train.validation import Validator

log = logging.getLogger("ipadapter_instruct")

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
PROJECT = "ipadapter-instruct"  # what trackers call all our runs together


def run(config: TrainConfig) -> None:
    """Train, or go on with a run that was interrupted.

    Raises:
        ValueError: settings, data and models do not fit one another, or the loss is no longer a number.
    """
    accelerator = Accelerator(
        mixed_precision=config.precision,
        cpu=config.cpu,
        log_with=config.trackers or None,
        project_config=ProjectConfiguration(str(config.out), logging_dir=str(config.out)),
    )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(
            "Checkpoints are gathered from the newer FSDP alone; add --fsdp_version 2 to `accelerate launch`."
        )
    accelerator.gradient_accumulation_steps = accumulation(config, accelerator.num_processes)
    if len(accelerator.log_with) < len(config.trackers):
        raise ValueError(
            f"Of the trackers {', '.join(config.trackers)} only {len(accelerator.log_with)} can be used here; install "
            "the others' packages, or leave them out of `trackers`."
        )
    config.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, accelerator)
    if accelerator.is_main_process:
        hold_to_settings(config, trainer.identity())
    accelerator.wait_for_everyone()
    before = signal.getsignal(signal.SIGTERM)
    try:
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
        accelerator.end_training()


def accumulation(config: TrainConfig, processes: int) -> int:
    """Micro-batches that each process takes before a step."""
    share, rest = divmod(config.batch_size, processes)
    micro = min(config.micro_batch_size, share)
    if rest or not share or share % micro:
        raise ValueError(
            f"batch_size {config.batch_size} cannot be cut into {processes} processes of micro-batches of "
            f"{config.micro_batch_size}; choose a multiple of {processes * config.micro_batch_size}."
        )
    return share // micro


def hold_to_settings(config: TrainConfig, identity: Mapping[str, Any]) -> None:
    """Keep the settings with the run, and hold a resumed run to them, once it has a checkpoint."""
    settings = config.model_dump(mode="json", exclude=FREE_SETTINGS) | dict(identity)
    path = config.out / CONFIG
    begun = path.exists() and checkpoints.newest(config.out / CHECKPOINTS) is not None
    before = json.loads(path.read_text(encoding="utf-8")) if begun else settings
    free = {"steps"} if config.schedule == "constant_with_warmup" else set()  # more of the same may follow
    changed = next((key for key in settings if before.get(key) != settings[key] and key not in free), None)
    if changed:
        raise ValueError(
            f"{config.out} holds a run with {changed} = {before.get(changed)}, not {settings[changed]}; "
            "give another --out, or the setting as it was."
        )
    write_json(path, settings)


class Trainer:
    """One process's part of a run."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator, self.main = config, accelerator, accelerator.is_main_process
        self.dtype = DTYPES[config.precision]
        self.tally = Tally(config.max_skipped)
        self.base, self.encoders, self.source, validation = load_data(config, self.tally)
        adapter = self._prepare_models()
        kind = {"fused": True} if config.fused_optimizer else {"foreach": True}
        optimizer = torch.optim.AdamW(
            adapter.parameters(), config.learning_rate, weight_decay=config.weight_decay, **kind
        )
        self.schedule = learning_rate_schedule(optimizer, config)
        self.model, self.optimizer = accelerator.prepare(adapter, optimizer)
        self.state = RunState(accelerator, self.model, self.optimizer, config.ema)
        self.validator = Validator(config, self.base, self.encoders, validation) if validation and self.main else None
        weights = config.tasks or dict.fromkeys(self.source.by_task, 1.0)
        missing = [task.value for task, weight in weights.items() if weight > 0 and task not in self.source.by_task]
        if missing:
            raise ValueError(
                f"The data hold no samples of the task {missing[0]}; leave it out of `tasks`, or build some."
            )
        timesteps = self.base.schedule.config.num_train_timesteps
        self.draws = Draws(config.seed, self.source.by_task, weights, config.dropout, timesteps)
        self.stopping = False

    def identity(self) -> dict[str, Any]:
        """What the run's files hold: the encoders behind the samples, and how many of these each task has."""
        encoders = self.encoders.identities() if self.encoders is not None else self.source.settings["encoders"]
        counts = {task.value: len(places) for task, places in self.source.by_task.items()}
        return {"encoders": encoders, "samples": dict(sorted(counts.items()))}

    def _prepare_models(self) -> TrainedAdapter:
        config, base, device = self.config, self.base, self.accelerator.device
        layers = prepare_unet(base.unet)
        adapter = start_adapter(
            config.start,
            config.projector,
            state_widths(self.source, self.encoders),
            layers,
            base.kind,
            instruction_encoder(self.source, self.encoders),
            config.seed,
        )
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        # diffusers' own `to` warns of layers that SD has not.
        torch.nn.Module.to(base.unet, device, self.dtype, memory_format=layout)
        if self.encoders is not None:
            self.encoders.to(device, self.dtype)
        elif self.main:
            base.vae.to(device)  # for validation pictures
        if config.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
        self.unet = torch.compile(base.unet) if config.compile else base.unet
        return TrainedAdapter(adapter.train())

    def train(self) -> None:
        """All steps that are left, with logs, validations and checkpoints between them."""
        config, accelerator = self.config, self.accelerator
        first_step = self._resume()
        if config.trackers:
            accelerator.init_trackers(PROJECT, config={k: str(v) for k, v in config.model_dump(mode="json").items()})
        self.log = RunLog(accelerator, config.out, first_step)
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopping", True))
        bar = tqdm(total=config.steps, initial=first_step, desc="train", unit="step", disable=not self.main)
        batches = self._batches(first_step)
        self.log.restart()
        for step in range(first_step + 1, config.steps + 1):
            self._step(batches)
            bar.update()
            last = step == config.steps
            if step % config.log_every == 0 or last:
                self.log.check(step, self.folder)
                figures = self.log.line(step, config.batch_size, self.schedule.get_last_lr()[0])
                bar.set_postfix(loss=f"{figures['loss']:.4f}")
            if config.validation.every and (step % config.validation.every == 0 or last):
                self._validate(step)
            stop = self._asked_to_stop(step)
            if step % config.checkpoint_every == 0 or last or stop:
                self._save(step)
            if stop:
                log.info("train: stopped at step %d, as asked; the same command goes on from there", step)
                return
        bar.close()
        self._report()

    @property
    def folder(self) -> Path:
        return self.config.out / CHECKPOINTS

    def _resume(self) -> int:
        checkpoint = checkpoints.newest(self.folder)
        if checkpoint is None:
            return 0
        state = checkpoints.read_state(checkpoint)
        self.state.load(checkpoint, state)
        for _ in range(state["step"]):
            self.schedule.step()
        if self.main:
            log.info("train: going on from %s", checkpoint)
        return state["step"]

    def _batches(self, first_step: int) -> Iterator[dict[str, Any]]:
        accelerator, config = self.accelerator, self.config
        slots = Slots(
            first_step + 1,
            config.steps + 1,
            config.batch_size,
            accelerator.gradient_accumulation_steps,
            accelerator.process_index,
            accelerator.num_processes,
        )
        return iter(loader(self.source, self.draws, slots, config.workers, accelerator.device.type == "cuda"))

    def _step(self, batches: Iterator[dict[str, Any]]) -> None:
        accelerator = self.accelerator
        for _ in range(accelerator.gradient_accumulation_steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            for damaged in batch["damaged"]:
                for name, why in damaged:
                    log.warning("train: skipped %s: %s", name, why)
                    self.tally.skip(name, why)
            self.tally.good(len(batch["name"]))
            with accelerator.accumulate(self.model):
                values = losses(self.unet, self.model, self.base.schedule, self._on_device(batch), self.dtype)
                accelerator.backward(values.mean())
                if accelerator.sync_gradients and self.config.max_grad_norm:
                    accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.log.add(batch["name"], batch["task"].to(values.device), values, waited)
        self.schedule.step()
        self.state.average()

    def _on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        device = self.accelerator.device
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        if self.encoders is not None:
            with torch.no_grad():
                moved = encode_batch(self.encoders, moved)
        if "pooled" in moved:
            side = moved["latents"].shape[-1] * 8
            moved["time_ids"] = self.base.size_condition(side, len(moved["latents"])).to(device)
        return moved

    def _asked_to_stop(self, step: int) -> bool:
        """Whether SIGTERM came, to this or another process; these agree at the steps that are logged."""
        if self.accelerator.num_processes == 1:
            return self.stopping
        if step % self.config.log_every:
            return False
        flag = torch.tensor(int(self.stopping), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum"))

    def _validate(self, step: int) -> None:
        started = time.perf_counter()
        state = self.state.weights(averaged=True)
        if self.validator is not None:
            scores = self.validator(step, Adapter.from_state_dict(state).to(self.accelerator.device))
            self.log.write(VALIDATION, step, scores)
            flat = {f"validation/{task}/{name}": value for task, part in scores.items() for name, value in part.items()}
            self.accelerator.log(flat, step=step)
        self.accelerator.wait_for_everyone()
        self.log.started += time.perf_counter() - started  # not a part of the steps' time

    def _save(self, step: int) -> None:
        started = time.perf_counter()
        self.log.check(step, self.folder)
        config = self.config.model_dump(mode="json")
        metadata = {"config": config, "data_sha256": self.source.sha256, **self.state.facts()}
        checkpoints.save(self.folder, step, self.state.write, metadata, self.config.keep, self.main)
        self.accelerator.wait_for_everyone()
        self.log.started += time.perf_counter() - started

    def _report(self) -> None:
        if self.main:
            log.info("train: done; `python -m training export --run %s --out FILE.safetensors`", self.config.out)
        if self.tally.skipped:
            log.warning("train: %d damaged samples were skipped", len(self.tally.skipped))


def learning_rate_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig) -> Any:
    from diffusers.optimization import get_scheduler

    return get_scheduler(config.schedule, optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps)
