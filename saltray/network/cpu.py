"""What makes PyTorch fast on CPUs."""

import ctypes
import platform
import sys
from pathlib import Path

import torch

# The options of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def use(cpus: float) -> None:
    """Give PyTorch this many CPUs, a part of one counting as one, and let this process keep freed memory.

    glibc hands every freed block of some megabytes back to Linux. A network's activations are such blocks,
    freed and allocated in each step, and Linux fills each with zeros again: a fifth to a half of a plain
    U-Net's time (`benchmarks/LOG.md`). What is free when this is called goes back: an earlier trial's.
    """
    torch.set_num_threads(max(1, round(cpus)))
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        malloc = ctypes.CDLL(None)
        malloc.malloc_trim(0)
        # No block apart from the heap, and the heap is never cut back.
        malloc.mallopt(_MMAP_MAX, 0)
        malloc.mallopt(_TRIM_THRESHOLD, -1)


def name() -> str:
    """Return the processor's name as Linux tells it, or its architecture."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
