"""A run that is killed at any moment goes on and reaches the very same weights; two processes reach those of one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training.train import checkpoints
from training.train.state import OPTIMIZER
from training.train.stopping import alone_in

from runs import ROOT, assert_same_moments, command, environment, finish, moments, train, weights

pytestmark = pytest.mark.usefixtures("features")
# Half of the steps are long enough to be met by a signal; all settings but these are `runs.settings`.
LONG = {"steps": 12, "checkpoint_every": 2, "ema": 0.9, "warmup": 3}
EVERY_STEP = {"checkpoint_every": 1, "keep": 8}


@pytest.fixture(scope="module")
def uninterrupted(workshop: Path, tmp_path_factory: pytest.TempPathFactory, features: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = finish(command(workshop, out, **LONG))
    assert done.returncode == 0, done.stderr
    return out


def assert_equal_runs(a: Path, b: Path) -> None:
    """Bit for bit: weights, their average, and the optimiser."""
    for name in ("adapter.safetensors", "average.safetensors"):
        first, second = weights(a, name), weights(b, name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    assert steps(a) == steps(b)
    optimizers = [torch.load(checkpoints.newest(run / "checkpoints") / OPTIMIZER, weights_only=True) for run in (a, b)]
    states = [optimizer["state"] for optimizer in optimizers]
    assert states[0].keys() == states[1].keys() and states[0]
    for key in states[0]:
        assert all(torch.equal(states[0][key][part], states[1][key][part]) for part in states[0][key])


def steps(run: Path) -> list[int]:
    """Which lines the log has: what was done twice is told once."""
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        env=environment(),
        cwd=environment()["PYTHONPATH"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: object, process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


@pytest.mark.parametrize("moment", ["between", "while saving"])
def test_a_killed_run_goes_on_bit_for_bit(workshop: Path, uninterrupted: Path, tmp_path: Path, moment: str) -> None:
    out = tmp_path / "killed"
    folder = out / "checkpoints"
    arguments = command(workshop, out, **LONG)
    process = start(arguments)
    beside = checkpoints.path_of(folder, 4)
    what = (folder / f".{beside.name}" / "adapter.safetensors") if moment == "while saving" else beside
    wait_for(what.exists, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if moment == "while saving":
        assert (folder / f".{beside.name}").exists() and not beside.exists(), "it was killed too late"
        (folder / ".step-00000099").mkdir()  # of a run before it, killed at a step that this one will not save
    assert not checkpoints.path_of(folder, 12).exists()
    done = finish(arguments)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr
    assert not list(folder.glob(".step-*"))
    assert_equal_runs(uninterrupted, out)


def test_a_second_run_in_a_folder_is_refused(workshop: Path, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "shared"
    arguments = command(workshop, out, **{**LONG, "steps": 1000, "warmup": 0})
    process = start(arguments)
    wait_for(lambda: (out / "metrics.jsonl").exists(), process)
    second = finish(arguments)
    assert second.returncode == 1 and second.stderr.splitlines()[-1] == (
        f"train: Another run is writing into {out}; wait until it has ended, stop it, or give another --out."
    )
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with alone_in(out):  # the killed one holds it no longer
        pass


def test_one_process_alone_hashes_the_checkpoint(workshop: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """Two of them resume: each file is read for its hash once, whoever asks."""
    out = tmp_path / "counted"
    shutil.copytree(uninterrupted, out)
    remove_after(10, out, 12)
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os\n"
        "from training import files\n"
        "sha256 = files.sha256\n"
        "def counted(path):\n"
        f"    with open({str(tmp_path / 'read')!r}, 'a') as log:\n"
        "        log.write(f'{os.environ[\"RANK\"]} {path}\\n')\n"
        "    return sha256(path)\n"
        "files.sha256 = counted\n"
    )
    arguments = command(workshop, out, *launcher(), **{**LONG, "micro_batch_size": 4, "checkpoint_every": 100})
    environ = {**environment(), "PYTHONPATH": f"{hook}:{ROOT}"}
    done = subprocess.run(arguments, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "going on from" in done.stderr, done.stderr
    lines = [line.split() for line in (tmp_path / "read").read_text().splitlines()]
    resumed = [path for _, path in lines if "/step-00000010/" in path]
    assert len(resumed) == len(set(resumed)) >= 4 and {rank for rank, _ in lines} == {"0"}


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGTERM, 2), (signal.SIGINT, 2)])
def test_a_signal_saves_and_leaves_cleanly(
    workshop: Path, uninterrupted: Path, tmp_path: Path, number: int, workers: int
) -> None:
    """A queue, and Ctrl-C, signal the whole group of processes, those that read ahead too."""
    out = tmp_path / "ended"
    arguments = command(workshop, out, **{**LONG, "checkpoint_every": 1000, "workers": workers})
    process = start(arguments)
    wait_for(lambda: (out / "metrics.jsonl").exists(), process)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "as asked" in errors
    saved = checkpoints.newest(out / "checkpoints")
    assert saved is not None and 0 < checkpoints.read_state(saved)["step"] < 12
    assert finish(arguments).returncode == 0
    assert_equal_runs(uninterrupted, out)


def test_a_damaged_checkpoint_is_passed_over(workshop: Path, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "damaged"
    train(workshop, out, **{**LONG, "steps": 12})
    last = checkpoints.newest(out / "checkpoints")
    content = bytearray((last / OPTIMIZER).read_bytes())
    content[len(content) // 2] ^= 1
    (last / OPTIMIZER).write_bytes(content)
    before = checkpoints.newest(out / "checkpoints")
    assert before is not None and before < last
    train(workshop, out, **LONG)
    assert_equal_runs(uninterrupted, out)


def test_only_the_newest_checkpoints_stay(uninterrupted: Path) -> None:
    kept = sorted(path.name for path in (uninterrupted / "checkpoints").iterdir())
    assert kept == ["step-00000008", "step-00000010", "step-00000012"]


def test_reading_ahead_changes_nothing(workshop: Path, uninterrupted: Path, tmp_path: Path) -> None:
    train(workshop, tmp_path / "ahead", **LONG, workers=2)
    assert_equal_runs(uninterrupted, tmp_path / "ahead")


def test_a_run_is_held_to_its_settings(workshop: Path, uninterrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="learning_rate = 0.001, not 0.01"):
        train(workshop, uninterrupted, **{**LONG, "learning_rate": 0.01})
    few = tmp_path / "features"
    shutil.copytree(workshop / "features", few)
    shutil.rmtree(few / "style")
    with pytest.raises(ValueError, match="holds a run with samples.style = 8, not None"):
        train(workshop, uninterrupted, **LONG, features=few)


def test_a_mistake_before_the_first_checkpoint_binds_nothing(workshop: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no base model"):
        train(workshop, tmp_path / "run", base=workshop / "bsae")
    assert train(workshop, tmp_path / "run", steps=1)


def test_files_may_move_and_more_steps_follow(workshop: Path, tmp_path: Path) -> None:
    whole = train(workshop, tmp_path / "whole", steps=4)
    train(workshop, tmp_path / "longer", steps=2)
    shutil.copytree(workshop / "features", tmp_path / "features")
    longer = train(workshop, tmp_path / "longer", steps=4, features=tmp_path / "features")
    assert all(torch.equal(longer[key], whole[key]) for key in whole)


def test_the_seed_matters(workshop: Path, uninterrupted: Path, tmp_path: Path) -> None:
    other = train(workshop, tmp_path / "other", **LONG, seed=1)
    assert not torch.equal(other["image_proj.latents"], weights(uninterrupted)["image_proj.latents"])


def launcher(*options: str) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone", *options)


@pytest.mark.parametrize("micro", [4, 2])
def test_two_processes_equal_one(workshop: Path, tmp_path: Path, micro: int) -> None:
    looked = {"every": 8, "samples": 2, "pictures": 2, "steps": 2, "scorer": workshop / "clip"}
    settings = {**EVERY_STEP, "validation": looked, "learning_rate": 1e-5}  # small: rounding tells in the pictures
    train(workshop, tmp_path / "one", **settings, micro_batch_size=8)
    done = finish(command(workshop, tmp_path / "two", *launcher(), **settings, micro_batch_size=micro))
    assert done.returncode == 0, done.stderr
    assert_same_steps(workshop, tmp_path / "two", tmp_path / "one", rate=1e-5)
    one, two = (json.loads((tmp_path / name / "validation.jsonl").read_text()) for name in ("one", "two"))
    assert one.keys() == two.keys() > {"everything", "style", "object"}
    for task, figures in one.items():
        assert two[task] == pytest.approx(figures, rel=1e-3, abs=1e-4)
    for sheet in (tmp_path / "one" / "validation" / "step-00000008").iterdir():
        first, second = (
            np.asarray(Image.open(tmp_path / name / "validation" / "step-00000008" / sheet.name), dtype=float)
            for name in ("one", "two")
        )
        assert first.shape == second.shape and np.abs(first - second).mean() < 1


ENDED = """
import gc, sys
import torch.distributed
from torch.nn.parallel import DistributedDataParallel
from training.__main__ import main

def destroyed(*arguments):
    assert not any(type(one) is DistributedDataParallel for one in gc.get_objects())
    print("nothing of it is left", file=sys.stderr)
    destroy(*arguments)

destroy, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, destroyed
main()
"""


def test_the_model_is_let_go_before_the_group_of_its_processes(workshop: Path, tmp_path: Path) -> None:
    """The other way round, one of them may wait for ever for a thread of gloo that still lets go of a validation."""
    (tmp_path / "script.py").write_text(ENDED)
    made = command(workshop, tmp_path / "run", steps=1, validation={"every": 1, "samples": 1, "pictures": 0})
    done = finish([made[0], *launcher(str(tmp_path / "script.py"), "train", made[-1])])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("nothing of it is left") == 2


def test_sharded_processes_equal_one_and_go_on(workshop: Path, tmp_path: Path) -> None:
    """FSDP: each process keeps half of each weight; the checkpoints are whole, and any number of processes resumes."""
    # Some gradients are longer than this: no shard may take its own length for the whole one's.
    settings = {**EVERY_STEP, "ema": 0.9, "max_grad_norm": 0.15}
    train(workshop, tmp_path / "one", **settings)
    script = str(Path(__file__).parents[1] / "helpers" / "fsdp_on_cpu.py")
    out = tmp_path / "sharded"
    arguments = [*command(workshop, out, **settings)[:1], *launcher(script), str(out.with_suffix(".toml")), "2"]
    done = finish(arguments)
    assert done.returncode == 0, done.stderr
    assert_same_steps(workshop, out, tmp_path / "one")
    before = weights(out), weights(out, "average.safetensors")
    remove_after(4, out)
    done = finish(arguments)
    assert done.returncode == 0 and "going on from" in done.stderr, done.stderr
    for old, new in zip(before, (weights(out), weights(out, "average.safetensors")), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    remove_after(4, out)
    train(workshop, out, **settings)
    assert_same_steps(workshop, out, tmp_path / "one")


def test_sharded_processes_teach_the_instruct_layers_alone(workshop: Path, tmp_path: Path) -> None:
    settings = {"steps": 2, "trained": "instruct", "new_layer_sigma": 0.05, "learning_rate": 1e-3}
    one = train(workshop, tmp_path / "one", **settings)
    script, out = str(Path(__file__).parents[1] / "helpers" / "fsdp_on_cpu.py"), tmp_path / "sharded"
    done = finish([*command(workshop, out, **settings)[:1], *launcher(script), str(out.with_suffix(".toml")), "2"])
    assert done.returncode == 0, done.stderr
    found, start = weights(out), load_file(workshop / "start.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in start.items())
    assert not {key for key in one if not torch.allclose(found[key], one[key], atol=1e-5)}
    assert found["image_proj.new_input_layers.0.0.to_out.weight"].any()  # was zero


def remove_after(step: int, out: Path, last: int = 8) -> None:
    for later in range(step + 1, last + 1):
        if checkpoints.path_of(out / "checkpoints", later).exists():
            shutil.rmtree(checkpoints.path_of(out / "checkpoints", later))


def test_the_old_fsdp_is_refused(workshop: Path, tmp_path: Path) -> None:
    script = str(Path(__file__).parents[1] / "helpers" / "fsdp_on_cpu.py")
    arguments = [*command(workshop, tmp_path / "old")[:1], *launcher(script), str(tmp_path / "old.toml"), "1"]
    done = finish(arguments)
    assert done.returncode != 0 and "fsdp_version 2" in done.stderr


def assert_same_steps(workshop: Path, found: Path, expected: Path, rate: float = 1e-3) -> None:
    """The same gradients at every step, and weights that AdamW moves by them."""
    before = load_file(workshop / "start.safetensors")
    for step in range(1, 9):
        seen = moments(found, step)
        assert_same_moments(seen, moments(expected, step))
        now = load_file(checkpoints.path_of(found / "checkpoints", step) / "adapter.safetensors")
        for name, weight in before.items():
            mean, square = seen[name]["exp_avg"] / (1 - 0.9**step), seen[name]["exp_avg_sq"] / (1 - 0.999**step)
            decay = 0.01 if weight.ndim > 1 and name != "image_proj.latents" else 0.0
            moved = rate * (mean / (square.sqrt() + 1e-15) + decay * weight)
            torch.testing.assert_close(
                now[name], weight - moved, rtol=0, atol=min(1e-6, rate / 100), msg=f"{name} at step {step}"
            )
        before = now
