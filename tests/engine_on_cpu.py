"""Runs a script under FSDP2 or DeepSpeed on the CPU: `python engine_on_cpu.py SCRIPT ARGUMENTS`, started by
torch.distributed.run, with the variables set that accelerate launch would set.

Accelerate knows these engines for accelerators alone: with CPU ranks it leaves the choice unheeded and trains with DDP.
The code behind them works on the CPU all the same, and so it can be tested here.
"""

import os
import runpy
import sys
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin

USES_DEEPSPEED = os.environ.pop("ACCELERATE_USE_DEEPSPEED", "false") == "true"
original = Accelerator.__init__


def initialize(self, *args, **kwargs):
    original(self, *args, **kwargs)
    kind = DistributedType.DEEPSPEED if USES_DEEPSPEED else DistributedType.FSDP
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = kind
    if USES_DEEPSPEED:
        import deepspeed

        deepspeed.init_distributed("gloo")
        plugin = DeepSpeedPlugin()
        plugin.set_mixed_precision(self.state._mixed_precision)
        AcceleratorState._shared_state["deepspeed_plugins"] = plugin
        AcceleratorState._shared_state["_mixed_precision"] = "no"
        plugin.select(_from_accelerator_state=True)
        self.deepspeed_engine_wrapped = None
    else:
        plugin = FullyShardedDataParallelPlugin()
        if self.mixed_precision != "no":
            plugin.set_mixed_precision(self.mixed_precision)
        AcceleratorState._shared_state["fsdp_plugin"] = plugin


if __name__ == "__main__":
    Accelerator.__init__ = initialize
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
    # All is done. Threads of gloo's groups abort the process once in a while as the interpreter is taken down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
