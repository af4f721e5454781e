"""What training from features saves: a step from features beside one that runs every encoder, and where each one's
time and memory go.

The models are SD1.5 and ViT-H/14 in their real dimensions on random weights, the steps are the trainer's own, and all
kinds of steps take turns in one process; peak memory is that of a process for each. Not a part of
`python -m benchmarks`: it takes ten minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from training.train.batches import Slots, loader

from .report import Result, parser, results_table, table, write
from .training_models import WAYS, Settings, Way, all_encoders, floor
from .training_parts import PARTS, REST, matrix_rate, operations, seconds_by_part, seconds_of

ROOT = Path(__file__).resolve().parent.parent
MOST_OF_ENCODERS = 0.5  # a step from features ÷ one with every encoder, at 256 px on a CPU
MOST_WAITING = 0.02  # of the time of steps from features
MOST_OF_MATRIX_TIME = 2.0  # a step ÷ its arithmetic at the card's full rate: half of the rate is used
READ_AHEAD = 4  # batches that each of the loader's workers reads ahead
FLOOR = "bare UNet"
Seconds = dict[str, list[float]]
NAMES = {FLOOR: "bare UNet, forward and backward", "features": "from features", "encoders": "with every encoder"}


def in_own_process(task: str, settings: Settings) -> str:
    """Run a task of `benchmarks.training_process`; returns what it printed last."""
    command = [sys.executable, "-m", "benchmarks.training_process", task, json.dumps(asdict(settings))]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"The benchmark's part {task} failed; its message is above.")
    return (done.stdout.split() or [""])[-1]


def interleave(steps: Mapping[str, Callable[[], None]], rounds: int) -> tuple[Seconds, Seconds]:
    """Seconds of each kind of step by round: by the clock, and of this process's work on the processor.

    An order, then its reverse; a first step of each does not count.
    """
    order = list(steps)
    clock: Seconds = {name: [] for name in order}
    processor: Seconds = {name: [] for name in order}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name in order:
            begun = time.process_time()
            clock[name].append(seconds_of(steps[name]))
            processor[name].append(time.process_time() - begun)
        order.reverse()
    return clock, processor


def ratio(name: str, above: list[float], below: list[float], most: float | None = None) -> list[Result]:
    """Median and middle half of a ratio of steps that took turns."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(above, below, strict=True)], method="inclusive")
    return [
        Result(name, middle, "", most),
        Result(f"{name}, lower quartile", low, ""),
        Result(f"{name}, upper quartile", high, ""),
    ]


def times(clock: Seconds, processor: Seconds, settings: Settings) -> list[Result]:
    """The steps' times, the ratio that training from features is for, and how far above the floor a step is."""
    found = [Result(f"{NAMES[name]}: a step", statistics.median(values), "s") for name, values in clock.items()]
    bound = settings.size == "real" and settings.resolution == 256 and settings.device == "cpu"
    kinds = {"": (clock, MOST_OF_ENCODERS if bound else None)}
    if settings.device == "cpu":  # the same on a machine that does other work, too
        kinds[", processor time"] = (processor, None)
    for kind, (seconds, most) in kinds.items():
        found += ratio(f"from features ÷ with every encoder{kind}", seconds["features"], seconds["encoders"], most)
        found += ratio(f"from features ÷ bare UNet{kind}", seconds["features"], seconds[FLOOR])
    return found


def parts_table(name: str, found: Mapping[str, float]) -> list[Result]:
    whole = sum(found.values())
    order = [part for part in (*PARTS, REST) if part in found]
    rows = [[part, f"{found[part] * 1000:.1f} ms", f"{found[part] / whole:.1%}"] for part in order]
    table(f"Parts of a step {NAMES[name]}", ["", "time", "share"], rows)
    return [Result(f"{NAMES[name]}: {part}, share of the step", found[part] / whole, "") for part in order]


def read_alone(way: Way, settings: Settings) -> float:
    """Seconds in which one process reads a batch, with nothing else to do."""
    slots = Slots(0, 11, settings.batch_size, 1, 0, 1)
    batches = iter(loader(way.trainer.source, way.trainer.draws, slots, 0, False))
    next(batches)  # opens the files
    return statistics.median(seconds_of(lambda: next(batches)) for _ in range(10))


def unbroken(way: Way, name: str, steps: int, settings: Settings, least: float) -> list[Result]:
    """Images a second, the loader's wait, and the share of the chip's rate, in steps one after another.

    ``least`` are the seconds that a step's arithmetic takes at that rate.
    """
    log = way.stretch(READ_AHEAD * settings.workers, steps)
    seconds = log["seconds_per_step"]
    wait = MOST_WAITING if settings.workers and settings.size == "real" else None
    rate = MOST_OF_MATRIX_TIME if settings.device == "cuda" and settings.size == "real" else None
    return [
        Result(f"{name}: images a second", log["images_per_second"], ""),
        Result(f"{name}: waiting for the loader, share of the steps", log["loader_wait_share"], "", wait),
        Result(f"{name}: share of the chip's matrix rate", least / seconds, ""),
        Result(f"{name}: a step ÷ its arithmetic at that rate", seconds / least, "", rate),
    ]


def measure(settings: Settings, rounds: int, compiled: bool) -> list[Result]:
    """Everything but peak memory, in this process."""
    models = all_encoders(settings)
    ways = {"features": Way(settings, "features", models.base), "encoders": Way(settings, "encoders", models)}
    bare = floor(ways["features"], settings)
    clock, processor = interleave({FLOOR: bare} | {name: way.step for name, way in ways.items()}, rounds)
    found = times(clock, processor, settings)
    results_table(title(settings, rounds, ways["features"]), found)
    for name, way in ways.items() if settings.device == "cpu" else ():  # a card works on while the marks end
        found += parts_table(name, seconds_by_part(way.step, max(2, rounds // 2)))
    step = statistics.median(clock["features"])
    rate = matrix_rate(settings.device, settings.precision)
    least = operations(ways["features"].step, settings.device) / rate
    more = [Result("a large matrix multiplication", rate / 1e12, "TFLOP/s")]
    more += unbroken(ways["features"], NAMES["features"], rounds, settings, least)
    more.append(Result("a batch read by one process ÷ a step", read_alone(ways["features"], settings) / step, ""))
    if compiled:
        way = Way(settings, "features", models.base, compile=True)
        way.stretch(0, 3)  # compiles
        more += unbroken(way, f"{NAMES['features']}, compiled", rounds, settings, least)
    results_table("Steps from features without a break", more)
    return found + more


def title(settings: Settings, rounds: int, way: Way) -> str:
    weights = sum(parameter.numel() for parameter in way.trainer.model.parameters())
    chip = f"{torch.get_num_threads()} threads of {os.cpu_count()} {platform.machine()} cores"
    if settings.device == "cuda":
        chip = torch.cuda.get_device_name()
    precision = {"no": "fp32"}.get(settings.precision, settings.precision)
    return (
        f"Time of a training step, SD1.5, {settings.size} dimensions, {settings.resolution} px, batch "
        f"{settings.batch_size}, {weights / 1e6:.1f} M weights trained, {rounds} rounds, {chip}, {precision}"
    )


def options() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    made = parser(__doc__)
    made.add_argument("--small", action="store_true", help="small dimensions: under a minute")
    made.add_argument("--resolution", type=int, help="side of the targets, in pixels, in place of 256 (small: 64)")
    made.add_argument("--batch-size", type=int, help="samples a step, in place of 4 (on a card: 32)")
    made.add_argument("--steps", type=int, default=5, help="rounds in which all kinds of steps take turns, 2 at least")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu", help="where to train")
    made.add_argument("--precision", choices=("no", "bf16", "fp16"), help="in place of no (fp32; on a card: bf16)")
    made.add_argument("--workers", type=int, help="processes that read ahead, in place of 1 (on a card: 4)")
    made.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="also measure torch.compile; on a card it is"
    )
    return made.parse_args()


def main() -> None:
    chosen = options()
    card = chosen.device == "cuda"

    def given(value: int | str | bool | None, default: int | str | bool) -> int | str | bool:
        return default if value is None else value

    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            size="small" if chosen.small else "real",
            resolution=given(chosen.resolution, 64 if chosen.small else 256),
            batch_size=given(chosen.batch_size, 32 if card else 4),
            device=chosen.device,
            precision=given(chosen.precision, "bf16" if card else "no"),
            workers=given(chosen.workers, 4 if card else 1),
            folder=folder,
        )
        in_own_process("data", settings)
        memory = [Result(f"{NAMES[way]}: peak memory", float(in_own_process(way, settings)), "GiB") for way in WAYS]
        results_table("Peak memory" + (" of the card" if card else " of the process"), memory)
        found = measure(settings, chosen.steps, given(chosen.compile, card))
    write([replace(result, name=f"training, {settings.size}: {result.name}") for result in found + memory], chosen.json)


if __name__ == "__main__":
    main()
