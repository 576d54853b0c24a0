"""Runs a script under FSDP2 on the CPU: `python fsdp_on_cpu.py SCRIPT ARGUMENTS`, started by torch.distributed.run.

Accelerate knows FSDP for accelerators alone: with CPU ranks it leaves the choice unheeded and trains with DDP. The code
behind it works on the CPU all the same, and so it can be tested here.
"""

import runpy
import sys
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

original = Accelerator.__init__


def initialize(self, *args, **kwargs):
    original(self, *args, **kwargs)
    plugin = FullyShardedDataParallelPlugin()
    if self.mixed_precision != "no":
        plugin.set_mixed_precision(self.mixed_precision)
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    Accelerator.__init__ = initialize
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
