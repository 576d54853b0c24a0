"""What benchmarks must know of the machine they run on."""

import platform
import resource
import statistics
import time
from pathlib import Path

import torch


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def product_rate(dtype: torch.dtype, size: int = 2048, repeats: int = 5) -> float:
    """Operations per second of a matrix product."""
    first, second = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
    times = []
    for _ in range(repeats + 1):
        started = clock()
        first @ second
        times.append(clock() - started)
    return 2 * size**3 / statistics.median(times[1:])


def processor() -> str:
    """The accelerator's name, or the CPU's and its number of cores, where the system tells."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} x {len(names) or 1}"


def peak_memory() -> int:
    """Bytes: of the accelerator, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
