import os
import platform
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its options are glibc's")


def printed(program: str, *arguments: str, **environment: str) -> int:
    """Run a program in a process of its own, as `cpu.use` is for the whole process; return what it prints."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


STEPS = """
import resource, sys, torch
from saltray.network import cpu
from saltray.config import ModelConfig
from saltray.network.model import build_model
torch.set_num_threads(1)
if sys.argv[1] == "used":
    cpu.use(1)
network, tiles = build_model(ModelConfig(filters=4, levels=2)), torch.rand(32, 1, 101, 101)
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    network(tiles).mean().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sum([step() for _ in range(16)][8:]))
"""


@glibc
def test_a_training_step_takes_the_memory_of_the_one_before() -> None:
    used, not_used = (printed(STEPS, how, MALLOC_ARENA_MAX="1") for how in ("used", "not used"))
    assert used < not_used / 5


HELD = """
import torch
from saltray.network import cpu
def held():
    return int(open("/proc/self/statm").read().split()[1])
cpu.use(1)
blocks = [torch.ones(2**18) for _ in range(200)]  # 1 MiB each
wall = torch.ones(1)  # behind them: the heap's end does not move
del blocks
kept = held()
cpu.use(1)
print(kept - held())
"""


@glibc
def test_what_an_earlier_trial_left_goes_back() -> None:
    pages = 200 * 2**20 / os.sysconf("SC_PAGE_SIZE")
    assert printed(HELD) > 0.9 * pages


@pytest.mark.parametrize(("cpus", "threads"), [(0.2, 1), (1.6, 2)])
def test_a_part_of_a_cpu_is_rounded_but_never_to_none(cpus: float, threads: int) -> None:
    program = (
        f"import torch; from saltray.network import cpu; cpu.use({cpus}); print(torch.get_num_threads())"
    )
    assert printed(program) == threads
