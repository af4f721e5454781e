"""A run under accelerate's FSDP on two CPU processes: `torchrun --nproc_per_node=2 fsdp_on_cpu.py CONFIG.toml`.

accelerate takes FSDP for cards alone; everything of it but that check runs on the CPU too.
"""

import logging
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
from training.cli.verbs import read_toml
from training.train import state
from training.train.loop import run
from training.train.settings import TrainConfig

begin, average = AcceleratorState.__init__, state.RunState.average


def begin_with_fsdp(self: AcceleratorState, *arguments: Any, **options: Any) -> None:
    begin(self, *arguments, **options)
    shared = AcceleratorState._shared_state
    if shared["distributed_type"] is not DistributedType.FSDP:
        shared["distributed_type"] = DistributedType.FSDP
        shared["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=int(sys.argv[2]), cpu_ram_efficient_loading=False
        )


def average_of_shards(self: state.RunState) -> None:
    assert all(isinstance(parameter, DTensor) for parameter in self.parameters.values()), "nothing is sharded"
    average(self)


logging.basicConfig(level=logging.INFO)
AcceleratorState.__init__ = begin_with_fsdp
state.RunState.average = average_of_shards
try:
    run(read_toml(TrainConfig, Path(sys.argv[1])))
except ValueError as error:
    sys.exit(str(error))
