"""What needs a process of its own: `python -m benchmarks.training_process data|features|encoders SETTINGS`.

``data`` writes shards and their features; a way of `benchmarks.training` prints the peak memory of its steps, in GiB.
"""

from __future__ import annotations

import json
import sys

from .training_models import Settings, Way, all_encoders, base_model, write_data


def main() -> None:
    task, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
    if task == "data":
        write_data(settings)
        return
    models = base_model(settings) if task == "features" else all_encoders(settings)
    print(Way(settings, task, models).stretch(ahead=0, steps=2)["memory_gib"])


if __name__ == "__main__":
    main()
