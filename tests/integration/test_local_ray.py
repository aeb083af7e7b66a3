"""The process that has a command's Ray, and that nothing of it outlives the command."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from tests.integration.programs import ROOT

CONNECTED = """
import signal
from saltray import connection
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
connection.connect(None, cpus=1)
try:
    print("ready", flush=True)
    input()
except KeyboardInterrupt:
    print(len(connection.nodes()), flush=True)
connection.disconnect()
"""
BEGUN = """
from saltray import local_ray
local_ray.begin()
print("ready", flush=True)
input()
"""


def start(program: str) -> "subprocess.Popen[str]":
    command = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert command.stdout is not None
    assert command.stdout.readline() == "ready\n"
    return command


def started_by(command: "subprocess.Popen[str]") -> list[psutil.Process]:
    """Return its process, and what Ray consists of so far."""
    started: list[psutil.Process] = psutil.Process(command.pid).children(recursive=True)
    assert started
    return started


def test_nothing_of_its_ray_outlives_a_command_that_is_killed() -> None:
    with start(CONNECTED) as command:
        started = started_by(command)
        command.kill()
    _, alive = psutil.wait_procs(started, timeout=60)
    assert alive == []


def words_of(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@pytest.mark.parametrize("wanted", ["gcs_server", "raylet", "default_worker.py"])
def test_a_ray_that_is_not_needed_after_all_ends_with_the_command(wanted: str) -> None:
    """However far it has come: Ray's workers are in groups of their own, and end by themselves late."""
    with start(BEGUN) as command:
        until = time.monotonic() + 60
        started = started_by(command)
        while not any(wanted in words for words in map(words_of, started)):
            assert time.monotonic() < until
            time.sleep(0.01)
            started = started_by(command)
        command.communicate("\n", timeout=60)
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []


def test_nothing_of_a_ray_stays_whose_own_process_was_killed() -> None:
    with start(CONNECTED) as command:
        started = started_by(command)
        host = next(p for p in started if "saltray.ray_host" in words_of(p))
        host.kill()
        command.communicate("\n", timeout=60)
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []


def test_ctrl_c_is_for_the_command_alone() -> None:
    """A search that is interrupted still needs its Ray, to write what it has."""
    with start(CONNECTED) as command:
        assert command.stdout is not None
        started = started_by(command)
        os.killpg(command.pid, signal.SIGINT)  # as a terminal does
        assert command.stdout.readline() == "1\n"
        assert command.wait(60) == 0
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []
