"""What makes sampling with few images faster on accelerators: compiled networks, and loops recorded as CUDA graphs."""

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch


def check_compilation(device: torch.device):
    """
    Raises:
        ValueError: if torch's own compiler (inductor) cannot make code for a device here, with what it lacks.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler  # here because it takes a second to import
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    otherwise = "Without `compile` the pipeline works as it is."
    if device.type == "cuda":
        if not has_triton():
            raise ValueError(f"Compiling for {device} needs Triton, which is not there. {otherwise}")
    elif device.type == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ValueError(f"Compiling for the CPU needs a C++ compiler such as g++. {otherwise}") from error
    else:
        raise ValueError(f"Compiling is supported on cpu and cuda, not on {device.type}. {otherwise}")


class CUDAGraphs:
    """
    Records what a function of tensors does on a CUDA device, and plays it back for other values: thousands of small
    kernels then start without Python.

    Args:
        most (`int`): recordings to keep; those that were not played for longest go first.
    """

    def __init__(self, most: int = 64):
        self.most = most
        self._recorded: OrderedDict[Hashable, tuple[torch.cuda.CUDAGraph, dict[str, torch.Tensor], torch.Tensor]] = (
            OrderedDict()
        )
        self._pools: dict[torch.device, tuple[int, int]] = {}  # of each device: graphs take turns in the same memory

    def __len__(self) -> int:
        return len(self._recorded)

    def __call__(self, key: Hashable, function: Callable[..., torch.Tensor], **inputs: torch.Tensor) -> torch.Tensor:
        """
        `function(**inputs)`.

        Args:
            key (`Hashable`): everything that the function's kernels depend on besides the inputs: numbers in Python,
                where weights lie. Names, shapes and types of the inputs are added to it.
            function (`Callable`): returns one tensor; must not wait for the device.
            **inputs (`torch.Tensor`): on one CUDA device.
        """
        key = (key, *((name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in inputs.items()))
        with torch.cuda.device(next(iter(inputs.values())).device):
            if key not in self._recorded:
                while len(self._recorded) >= self.most:
                    self._recorded.popitem(last=False)
                self._recorded[key] = self._record(function, inputs)
            self._recorded.move_to_end(key)
            graph, places, output = self._recorded[key]
            for name, tensor in inputs.items():
                places[name].copy_(tensor)
            graph.replay()
            return output.clone()  # the next replay writes there

    def _record(
        self, function: Callable[..., torch.Tensor], inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, dict[str, torch.Tensor], torch.Tensor]:
        places = {name: tensor.clone() for name, tensor in inputs.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries choose their kernels, torch compiles its own: not to be recorded
            for _ in range(2):
                function(**places)
        torch.cuda.current_stream().wait_stream(stream)
        device = torch.device("cuda", torch.cuda.current_device())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pools.setdefault(device, torch.cuda.graph_pool_handle())):
            output = function(**places)
        return graph, places, output
