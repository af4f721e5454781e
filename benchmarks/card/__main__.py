"""Every part in turn, each in a process of its own, so that one that fails or runs out of memory ends alone."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

PARTS = ("right", "fast", "train_fast", "train_right", "compiled", "train_compiled")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.card", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--json", type=Path, default=Path("card.json"), help="written again after each line")
    parser.add_argument("--seconds", type=float, default=400, help="after which a part is ended, and none begun")
    parser.add_argument("--cpu", action="store_true", help="on this processor, where no card is")
    parser.add_argument("--small", action="store_true", help="small models, to try the script itself")
    chosen = parser.parse_args()
    unknown = sorted(set(chosen.parts) - set(PARTS))
    if unknown:
        parser.error(f"there is no part {unknown[0]}; choose from {', '.join(PARTS)}")
    return chosen


def run(part: str, chosen: argparse.Namespace, seconds: float) -> str:
    """What became of a part: "" where it is whole."""
    if seconds < 1:
        return "not begun, for time"
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if chosen.cpu else {})
    command = [sys.executable, "-m", f"benchmarks.card.{part}", "--json", str(chosen.json)]
    log = chosen.json.with_suffix(f".{part}.log")
    with open(log, "w") as errors:
        process = subprocess.Popen(command + ["--small"] * chosen.small, env=environment, stderr=errors)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return "cut off, for time"
    if status == 0:
        return ""
    print(log.read_text()[-2000:], flush=True)
    return f"ended in an error: {log} tells more"


def main() -> None:
    begun = time.perf_counter()
    chosen = options()
    if not (chosen.cpu or torch.cuda.is_available()):
        raise SystemExit("There is no card that this PyTorch can use; add --cpu --small to try the script without.")
    card = f"{platform.machine()} processor" if chosen.cpu else torch.cuda.get_device_name()
    head = {"card": card, "torch": torch.__version__, "small": chosen.small, "seconds": {}, "notes": [], "results": []}
    chosen.json.write_text(json.dumps(head) + "\n")
    print(f"{card}, torch {torch.__version__}", flush=True)
    faults = {}
    for part in chosen.parts or PARTS:
        print(f"\n{part}", flush=True)
        started = time.perf_counter()
        fault = run(part, chosen, chosen.seconds - (started - begun))
        content = json.loads(chosen.json.read_text())
        content["seconds"][part] = round(time.perf_counter() - started, 1)
        if fault:
            faults[part] = fault
            content["notes"].append(f"{part}: {fault}")
        chosen.json.write_text(json.dumps(content, indent=1) + "\n")
        print(f"  {content['seconds'][part]} s{fault and ', ' + fault}", flush=True)
    missed = [result["name"] for result in content["results"] if result["ok"] is False]
    print(f"\n{len(content['results'])} results, {len(missed)} targets missed" + "".join(f"\n  {n}" for n in missed))
    if faults:
        raise SystemExit("Not whole: " + "; ".join(f"{part}, {fault}" for part, fault in faults.items()))


if __name__ == "__main__":
    main()
