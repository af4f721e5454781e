"""`train`: the loop, from features or raw shards to checkpoints, on one process or many."""

import gc
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.checkpoint import save as save_adapter
from torch import Tensor
from torch.profiler import record_function
from tqdm import tqdm
from training.datasets.shards import Tally
from training.features.draws import Draws
from training.features.stored import encode_batch
from training.frozen.attention import quick_gradients
from training.frozen.network import embedding, prepare
from training.frozen.noise import follows_flow
from training.train import checkpoints
from training.train.adapter import TrainedAdapter, losses, start_adapter, train_instruct_alone
from training.train.batches import Slots, loader
from training.train.data import identity, instruction_encoder, load_data, state_widths
from training.train.log import VALIDATION, RunLog, profiler
from training.train.optimizer import learning_rate_schedule, make_optimizer, update
from training.train.settings import TrainConfig, hold_to_settings
from training.train.state import RunState
from training.train.stopping import Stop, alone_in
from training.train.validation import Validator, summary

log = logging.getLogger("ipadapter_instruct")

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
SNAPSHOTS = "snapshots"
PROFILE = "profile"
PROJECT = "ipadapter-instruct"  # what trackers call all our runs together


def run(config: TrainConfig) -> None:
    """Train, or go on with a run that was interrupted.

    Raises:
        ValueError: settings, data and models do not fit one another, or the loss is no longer a number.
    """
    accelerator = Accelerator(
        mixed_precision=config.precision,
        cpu=config.cpu,
        log_with=list(config.trackers) or None,
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
    with alone_in(config.out) if accelerator.is_main_process else nullcontext():
        trainer = Trainer(config, accelerator)
        if accelerator.is_main_process:
            hold_to_settings(config, trainer.facts, config.out / CONFIG, begun=trainer.checkpoint is not None)
            checkpoints.sweep(config.out / CHECKPOINTS)
        accelerator.wait_for_everyone()
        try:
            with trainer.stop.listening():
                trainer.train()
        finally:
            # The model holds the group of processes. Were it the last to let go, it would do so with Python's lock, for
            # which a thread of gloo may still wait that lets go of what validation gathered: neither would end.
            del trainer
            accelerator.free_memory()
            gc.collect()
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


class Trainer:
    """One process's part of a run."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator, self.main = config, accelerator, accelerator.is_main_process
        self.dtype = DTYPES[config.precision]
        self.tally = Tally(config.max_skipped)
        self.base, self.encoders, self.source, validation = load_data(config, self.tally)
        # As they are in the files, before they are cast and moved.
        self.facts = identity(self.base, self.encoders, self.source) if self.main else {}
        adapter = self._prepare_models()
        optimizer = make_optimizer(config, adapter, accelerator.device)
        self.schedule = learning_rate_schedule(optimizer, config)
        self.model, self.optimizer = accelerator.prepare(adapter, optimizer)
        self.state = RunState(accelerator, self.model, self.optimizer, config.ema)
        self.validator = None
        if validation:
            ranks = accelerator.process_index, accelerator.num_processes
            self.validator = Validator(config, self.base, self.encoders, validation, *ranks)
        weights = config.tasks or dict.fromkeys(self.source.by_task, 1.0)
        missing = [task.value for task, weight in weights.items() if weight > 0 and task not in self.source.by_task]
        if missing:
            raise ValueError(
                f"The data hold no samples of the task {missing[0]}; leave it out of `tasks`, or build some."
            )
        schedule = self.base.schedule
        self.draws = Draws(
            config.seed,
            self.source.by_task,
            weights,
            config.dropout,
            schedule.config.num_train_timesteps,
            logit_normal=follows_flow(schedule),
        )
        found = [checkpoints.newest(self.folder) if self.main else None]  # one process reads and hashes it all
        self.checkpoint: Path | None = broadcast_object_list(found)[0]
        self.stop = Stop()

    def _prepare_models(self) -> TrainedAdapter:
        config, base, device = self.config, self.base, self.accelerator.device
        layers = prepare(base.network)
        adapter = start_adapter(
            config.start,
            config.projector,
            state_widths(self.source, self.encoders),
            layers,
            base.kind,
            instruction_encoder(self.source, self.encoders),
            config.seed,
            base.network,
            config.new_layer_sigma,
        )
        if config.trained == "instruct":
            train_instruct_alone(adapter)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        # diffusers' own `to` warns of layers that SD has not.
        move: Any = torch.nn.Module.to
        move(base.network, device, self.dtype, memory_format=layout)
        if self.encoders is not None:
            self.encoders.to(device, self.dtype)
        else:
            base.vae.to(device)  # for validation pictures
        if config.gradient_checkpointing:
            base.network.enable_gradient_checkpointing()
        self.network = torch.compile(base.network) if config.compile else base.network
        return TrainedAdapter(adapter.train(), embedding(base.network))

    def train(self) -> None:
        """All steps that are left, with logs, validations and checkpoints between them."""
        config, accelerator = self.config, self.accelerator
        first_step = self._resume()
        if config.trackers:
            accelerator.init_trackers(PROJECT, config={k: str(v) for k, v in config.model_dump(mode="json").items()})
        self.log = RunLog(accelerator, config.out, first_step, self.source.shards.name)
        if first_step and self._is_looked_at(first_step) and not self.log.has(VALIDATION, first_step):
            self._validate(first_step)  # before which the run was stopped, or had too little memory
        self.bar = tqdm(total=config.steps, initial=first_step, desc="train", unit="step", disable=not self.main)
        batches = self._batches(first_step)
        self.log.restart()
        with self.bar, profiler(config.profile if self.main else 0, config.out / PROFILE) as trace:
            for step in range(first_step + 1, config.steps + 1):
                self._step(batches, self._is_told(step))
                trace.step()
                if self._after(step):
                    log.info("train: stopped at step %d, as asked; the same command goes on from there", step)
                    return
        self._report()

    def _is_told(self, step: int) -> bool:
        """Whether the log has a line of this step."""
        return step % self.config.log_every == 0 or step == self.config.steps

    def _is_looked_at(self, step: int) -> bool:
        """Whether validation is due at this step."""
        every = self.config.validation.every
        return every > 0 and (step % every == 0 or step == self.config.steps)

    def _after(self, step: int) -> bool:
        """What is due after a step; whether the run is to stop here."""
        config, last = self.config, step == self.config.steps
        self.bar.update()
        if self._is_told(step):
            self.log.check(step, self.folder)
            figures = self.log.line(step, config.batch_size, self.schedule.get_last_lr()[0])
            self.bar.set_postfix(loss=f"{figures['loss']:.4f}")
        stop = self._asked_to_stop(step)
        # First the snapshot, so that a run killed between the two makes it again; last what takes memory of its own.
        if config.snapshot_every and step % config.snapshot_every == 0:
            self._snapshot(step)
        if step % config.checkpoint_every == 0 or last or stop:
            self._save(step)
        if self._is_looked_at(step) and not stop:
            self._validate(step)
        return stop

    @property
    def folder(self) -> Path:
        return self.config.out / CHECKPOINTS

    def _resume(self) -> int:
        checkpoint = self.checkpoint
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

    def _step(self, batches: Iterator[dict[str, Any]], told: bool) -> None:
        """One step of the optimiser; ``told`` asks for its norms, which the log's next line has."""
        accelerator = self.accelerator
        for _ in range(accelerator.gradient_accumulation_steps):
            asked = time.perf_counter()
            with record_function("wait for samples"):
                batch = next(batches)
            waited = time.perf_counter() - asked
            for name, why in (one for damaged in batch["damaged"] for one in damaged):
                log.warning("train: skipped %s: %s", name, why)
                self.tally.skip(name, why)
            self.tally.good(len(batch["place"]))
            with accelerator.accumulate(self.model):
                with record_function("features"):
                    moved = self._on_device(batch)
                with quick_gradients(moved["latents"], self.dtype):  # checkpointed blocks run again in the second half
                    with record_function("loss"):
                        values = losses(self.network, self.model, self.base.schedule, moved, self.dtype)
                    with record_function("gradients"):
                        accelerator.backward(values.mean())
                with record_function("optimizer"):
                    if accelerator.sync_gradients:
                        longest = self.config.max_grad_norm
                        self.log.norms = update(accelerator, self.optimizer, self.state.parameters, longest, told)
                    else:
                        self.optimizer.step()
                    self.optimizer.zero_grad()
            self.log.add(batch["place"], batch["task"].to(values.device), values, waited)
        self.schedule.step()
        self.state.average()

    def _on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        device = self.accelerator.device
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        if self.encoders is not None:
            with torch.no_grad():
                moved = encode_batch(self.encoders, moved)
        if "pooled" in moved:
            moved["added"] = self.base.added(moved["pooled"], moved["latents"].shape[-1] * 8, self.dtype)
        return moved

    def _asked_to_stop(self, step: int) -> bool:
        """Whether this or another process was asked to; they agree at the steps that are logged."""
        if self.accelerator.num_processes == 1:
            return self.stop.asked
        if step % self.config.log_every:
            return False
        flag = torch.tensor(int(self.stop.asked), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum"))

    def _validate(self, step: int) -> None:
        started = time.perf_counter()
        state = self.state.weights(averaged=True)
        if self.validator is not None:
            scores = self.validator(step, Adapter.from_state_dict(state).to(self.accelerator.device))
            self.log.write(VALIDATION, step, scores)
            if self.main:
                log.info("train: step %d, held out: %s", step, summary(scores))
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

    def _snapshot(self, step: int) -> None:
        adapter = self.state.adapter(self.state.weights(averaged=True))
        if self.main:
            folder = self.config.out / SNAPSHOTS
            folder.mkdir(exist_ok=True)
            save_adapter(folder / f"step-{step:08d}.safetensors", adapter.half(), steps=str(step))
        self.accelerator.wait_for_everyone()

    def _report(self) -> None:
        if self.main:
            log.info("train: done; `python -m training export --run %s --out FILE.safetensors`", self.config.out)
        if self.tally.skipped:
            log.warning("train: %d damaged samples were skipped", len(self.tally.skipped))
