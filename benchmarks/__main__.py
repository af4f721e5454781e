"""Every benchmark in turn, each in a process of its own, so that none sees another's memory."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

BENCHMARKS = ("counts", "arithmetic", "steps", "apply")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all results into this file")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in BENCHMARKS:
            file = Path(folder) / f"{name}.json"
            command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(file)]
            if subprocess.run(command).returncode != 0:
                raise SystemExit(f"The benchmark {name} failed; its message is above.")
            results += json.loads(file.read_text())
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    missed = [result["name"] for result in results if result["ok"] is False]
    print(f"\n{len(results)} results, {len(missed)} targets missed" + "".join(f"\n  {name}" for name in missed))


if __name__ == "__main__":
    main()
